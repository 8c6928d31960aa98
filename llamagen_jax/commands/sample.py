"""Generates images of classes or prompts.

llamagen sample --gpt=c2i_L_384 --tokenizer=vq16 --classes=207,360-362 --out=x.png
llamagen sample --gpt=t2i/bundle --tokenizer=vq16 --t5=/data/flan-t5-xl \\
    --prompts "a red fox on a green hill" --count=4 --out=foxes
llamagen sample --gpt=c2i_L_384 --tokenizer=vq16 --fid-batch=50000 --out=x.npz
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from etils import epath
import jax
import numpy as np
from PIL import Image

import llamagen_jax
from llamagen_jax.commands import arguments, generation
from llamagen_jax.errors import UserError
from llamagen_jax.images import grid, save_npz, save_png
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.sampling import fid_batch
from llamagen_jax.sampling.prompts import write_captions
from llamagen_jax.sampling.sample import (
  Labels,
  SamplingJob,
  num_data_shards,
  sample_images,
)
from llamagen_jax.sampling.sizes import for_size
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.sides import Sides
from llamagen_jax.storage import user_path, write_json
from llamagen_jax.weights import bundle

BATCH_SIZE = 16
EVALUATED_SIDE = 256  # published scores are of images of this side
LABELS = fid_batch.LABELS  # a field of the options hides the module's name
LABELLED_WIDTH = 64  # smaller images are too narrow for a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(generation.GenerationOptions):
  """Options of sample."""

  fid_batch: int | None = option(
    "this many images of classes of all kinds, for an evaluation", None,
    unit="IMAGES", at_least=1, group="images to generate",
  )  # fmt: skip
  labels: str = option(
    "classes of --fid-batch", "uniform", choices=LABELS,
    group="images to generate",
  )  # fmt: skip
  out: str = option(
    "x.png (a grid), x.npz (arr_0), or a new folder", unit="PATH", group="output"
  )
  png_folder: str | None = option(
    "--fid-batch writes its images here, too", None, unit="FOLDER", group="output"
  )
  image_size: Sides | None = option(
    "SIDE or WIDTHxHEIGHT of the images written, in a shape that the model draws;"
    f" default: as generated, and squares of --fid-batch at most {EVALUATED_SIDE}",
    None, unit="PIXELS", group="output",
  )  # fmt: skip
  batch_size: int = option(
    "images at a time on every device", BATCH_SIZE, unit="IMAGES", at_least=1,
    group="computation",
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  run(arguments.parse(Options, "sample", argv, __doc__))


def run(args: Options) -> None:
  """Generates and writes what the options ask for."""
  _check(args)
  hosts.initialize_distributed(args)
  out = user_path(args.out)
  models = generation.load_models(args)
  _, tokenizer, sampling, mesh, _ = models
  gpt, sampled_size = for_size(models.gpt, tokenizer, args.image_size)
  image_size = args.image_size or sampled_size
  batch_size = args.batch_size
  if args.fid_batch:
    generation.check_condition(args, gpt, "class")
    labels = fid_batch.choose_labels(
      args.labels, args.fid_batch, gpt.config.num_classes, args.seed
    )
    conditions = Labels(labels, gpt.class_names)
    if args.image_size is None and isinstance(image_size, int):
      image_size = min(image_size, EVALUATED_SIDE)
  else:
    conditions = generation.conditions(args, models)
    batch_size = min(batch_size, math.ceil(len(conditions) / num_data_shards(mesh)))
  job = SamplingJob(conditions, sampling, args.seed, batch_size, image_size)
  settings = _settings(args, gpt, tokenizer, job, sampled_size)
  gpt = generation.for_decoding(gpt, args.weights)

  if args.fid_batch:
    timings = fid_batch.run(
      gpt, tokenizer, job, out, settings, conditions.labels, folder=args.png_folder
    )
    if timings is None:
      print(f"{out} is finished already")
      return
  else:
    timings = Timings()
    images = sample_images(gpt, tokenizer, job, timings)
    if jax.process_index() == 0:
      _write(out, images, job, args.count, settings)
  if jax.process_index() == 0:
    print(f"{len(job.conditions)} images in {out}, {timings}")


def _check(args: Options) -> None:
  """Refuses options that no model could follow, before any model is read."""
  generation.check(args, "fid_batch")
  if args.fid_batch and args.count > 1:
    raise UserError("--fid-batch chooses its classes: it takes no --count")
  if args.fid_batch and user_path(args.out).suffix != ".npz":
    raise UserError(f"--out={args.out}: expected a name that ends in .npz")
  generation.check_out(args.out)
  if args.png_folder and not args.fid_batch:
    raise UserError("--png-folder goes with --fid-batch: give a folder as --out")


def _settings(
  args: Options,
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  sampled_size: Sides,
) -> dict[str, Any]:
  """Returns everything that decides the images, for the JSON file next to an npz."""
  return {
    "count": len(job.conditions),
    "image_size": job.image_size,
    "sampled_size": sampled_size,
    "labels": args.labels if args.fid_batch else "given",
    "prompts": getattr(job.conditions, "prompts", None),
    "negative_prompt": getattr(job.conditions, "negative", None),
    "seed": job.seed,
    "sampling": dataclasses.asdict(job.sampling),
    "batch_size": job.batch_size,
    "transformer": bundle.fingerprint(gpt.params),
    "weights": args.weights,
    "transformer_config": dataclasses.asdict(gpt.config),
    "tokenizer": tokenizer.identity,
    "tokenizer_config": dataclasses.asdict(tokenizer.config),
    "backend": jax.default_backend(),
    "versions": {"llamagen_jax": llamagen_jax.__version__, "jax": jax.__version__},
  }


def _write(
  out: epath.Path,
  images: np.ndarray,
  job: SamplingJob,
  count: int,
  settings: dict[str, Any],
) -> None:
  """Writes images as a folder, an npz or a grid, by the name of `out`."""
  names = [job.conditions.name(i) for i in range(len(images))]
  prompts = getattr(job.conditions, "prompts", None)
  if out.suffix not in generation.FILES:
    out.mkdir(parents=True, exist_ok=True)
    if prompts is not None:
      names = [""] * len(images)
      write_captions(out, prompts)
    for index, image in enumerate(images):
      name = "_".join(names[index].split()).replace("/", "-")
      stem = f"{index:05d}_{name}".rstrip("_")
      save_png(out / f"{stem}.png", Image.fromarray(image))
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  if out.suffix == ".npz":
    write_json(fid_batch.settings_path(out), settings)
    save_npz(out, [images], len(images), getattr(job.conditions, "labels", None))
    return
  columns = count if count > 1 else min(len(images), 8)
  labelled = images.shape[2] >= LABELLED_WIDTH
  sheet = grid(images, columns, names if labelled else ())
  save_png(out, sheet)
