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

from absl import logging
from etils import epath
import jax
import numpy as np
from PIL import Image

import llamagen_jax
from llamagen_jax.commands import arguments, sampling_flags
from llamagen_jax.data.classes import to_labels
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.quantized import quantize_params
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import grid, save_npz, save_png
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sampling import fid_batch
from llamagen_jax.sampling.keys import check_seed
from llamagen_jax.sampling.prompts import Prompts, read_prompts, write_captions
from llamagen_jax.sampling.sample import (
  Labels,
  SamplingJob,
  Timings,
  check_pair,
  num_data_shards,
  restrict_to_codebook,
  sample_images,
)
from llamagen_jax.storage import read_text, user_path, write_json
from llamagen_jax.training.export import load_run
from llamagen_jax.weights import bundle
from llamagen_jax.weights.adapter import apply_adapter
from llamagen_jax.weights.t5 import load_t5

BATCH_SIZE = 16
EVALUATED_SIDE = 256  # published scores are of images of this side
FILES = (".png", ".npz")  # any other name is a folder's
OTHER_FILES = (
  ".bmp",
  ".gif",
  ".jpeg",
  ".jpg",
  ".npy",
  ".pdf",
  ".tiff",
  ".webp",
  ".zip",
)
LABELS = fid_batch.LABELS  # a field of the options hides the module's name
LABELLED_SIDE = 64  # smaller images are too narrow for a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(hosts.HostOptions, sampling_flags.SamplingOverrides):
  """Options of sample."""

  gpt: str | None = option(
    "bundle of the transformer", None, unit="FOLDER", group="models"
  )
  workdir: str | None = option(
    "in place of --gpt: a run of train-gpt, of which the newest checkpoint is taken",
    None, unit="FOLDER", group="models",
  )  # fmt: skip
  adapter: str | None = option(
    "what a finetuned model adds to the transformer", None, unit="FOLDER",
    group="models",
  )  # fmt: skip
  tokenizer: str = option("bundle of the tokenizer", unit="FOLDER", group="models")
  t5: str | None = option(
    "the T5 that the transformer was trained with", None, unit="FOLDER", group="models"
  )
  classes: str | None = option(
    "indices, names and ranges: 207,360-362,'golden retriever'", None,
    group="images to generate",
  )  # fmt: skip
  classes_file: str | None = option(
    "the same in a file, also one a line", None, unit="FILE", group="images to generate"
  )
  prompts: tuple[str, ...] | None = option(
    "texts, in quotes", None, group="images to generate"
  )
  prompt_file: str | None = option(
    "the same: x.txt, a prompt a line, or x.csv or x.tsv and the column after a colon",
    None, unit="FILE", group="images to generate",
  )  # fmt: skip
  negative_prompt: str = option(
    "text that guidance leads away from", "", group="images to generate"
  )
  count: int = option(
    "images a class or prompt", 1, unit="IMAGES", at_least=1,
    group="images to generate",
  )  # fmt: skip
  fid_batch: int | None = option(
    "this many images of classes of all kinds, for an evaluation", None,
    unit="IMAGES", at_least=1, group="images to generate",
  )  # fmt: skip
  labels: str = option(
    "classes of --fid-batch", "uniform", choices=LABELS,
    group="images to generate",
  )  # fmt: skip
  seed: int = option("of the random numbers", 0, group="images to generate")
  out: str = option(
    "x.png (a grid), x.npz (arr_0), or a new folder", unit="PATH", group="output"
  )
  png_folder: str | None = option(
    "--fid-batch writes its images here, too", None, unit="FOLDER", group="output"
  )
  image_size: int | None = option(
    "side of the images written; default: as generated, and at most"
    f" {EVALUATED_SIDE} for --fid-batch", None, unit="PIXELS", at_least=1,
    group="output",
  )  # fmt: skip
  batch_size: int = option(
    "images at a time on every device", BATCH_SIZE, unit="IMAGES", at_least=1,
    group="computation",
  )  # fmt: skip
  tensor: int = option(
    "devices that share one model", 1, unit="DEVICES", at_least=1, group="computation"
  )
  dtype: str | None = option(
    "of the transformer's activations; default: float32 on CPU, else bfloat16", None,
    choices=("float32", "bfloat16"), group="computation",
  )  # fmt: skip
  weights: str = option(
    "of the transformer's matrices; int8 halves the bytes that a step in bfloat16"
    " reads, and changes the codes a little", "float", choices=("float", "int8"),
    group="computation",
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  run(arguments.parse(Options, "sample", argv, __doc__))


def run(args: Options) -> None:
  """Generates and writes what the options ask for."""
  if bool(args.gpt) == bool(args.workdir):
    raise UserError("expected either --gpt or --workdir")
  _check(args)
  hosts.initialize_distributed(args)
  out = user_path(args.out)
  mesh = make_mesh(tensor=args.tensor)
  dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  gpt = _load_gpt(args, mesh, dtype)
  tokenizer = bundle.load_tokenizer(args.tokenizer, mesh)
  check_pair(gpt, tokenizer)
  gpt = restrict_to_codebook(gpt, tokenizer)

  of_prompts = args.prompts or args.prompt_file
  conditions = _prompts(args, gpt, dtype) if of_prompts else _labels(args, gpt)
  sampling = dataclasses.replace(gpt.sampling, **sampling_flags.given(args))
  sampling.check_model(gpt.config.guidance_embedding)
  sampled_side = side = gpt.config.grid * tokenizer.config.downsample
  batch_size = args.batch_size
  if args.fid_batch:
    side = min(sampled_side, EVALUATED_SIDE)
  else:
    batch_size = min(batch_size, math.ceil(len(conditions) / num_data_shards(mesh)))
  image_size = args.image_size or side
  job = SamplingJob(conditions, sampling, args.seed, batch_size, image_size)
  settings = _settings(args, gpt, tokenizer, job, sampled_side)
  params = decoding_params(gpt.config, gpt.params)
  if args.weights == "int8":
    params = quantize_params(params)
  gpt = dataclasses.replace(gpt, params=params)

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
  check_seed(args.seed, "--seed")
  SamplingConfig(**sampling_flags.given(args))
  sources = ("classes", "classes_file", "prompts", "prompt_file", "fid_batch")
  if sum(bool(getattr(args, name)) for name in sources) != 1:
    raise UserError(
      "expected one of --classes, --classes-file, --prompts, --prompt-file and"
      " --fid-batch"
    )
  out = user_path(args.out)
  if args.fid_batch and out.suffix != ".npz":
    raise UserError(f"--out={args.out}: expected a name that ends in .npz")
  if out.suffix.lower() in OTHER_FILES:
    raise UserError(
      f"--out={args.out}: expected a name that ends in .png or .npz, or a folder"
    )
  if out.suffix not in FILES and out.is_file():
    raise UserError(f"--out={args.out}: is a file, expected a folder")
  if args.png_folder and not args.fid_batch:
    raise UserError("--png-folder goes with --fid-batch: give a folder as --out")


def _load_gpt(args: Options, mesh: jax.sharding.Mesh, dtype: str) -> bundle.Transformer:
  """Returns the transformer of --gpt or --workdir, with its --adapter."""
  if args.workdir:
    step, gpt = load_run(user_path(args.workdir), mesh=mesh)
    logging.info("the transformer is of step %d in %s", step, args.workdir)
    gpt = dataclasses.replace(gpt, config=dataclasses.replace(gpt.config, dtype=dtype))
  else:
    gpt = bundle.load_gpt(args.gpt, mesh, dtype)
  return apply_adapter(args.adapter, gpt) if args.adapter else gpt


def _prompts(args: Options, gpt: bundle.Transformer, dtype: str) -> Prompts:
  if gpt.config.condition != "caption":
    raise UserError(f"--gpt={args.gpt} is a model of classes: give --classes")
  if not args.t5:  # a bundle names its encoder, and does not hold it
    raise UserError("prompts need --t5, the folder of their text encoder")
  texts = args.prompts or read_prompts(args.prompt_file)
  encoder = load_t5(args.t5, dtype=dtype)
  repeated = tuple(text for text in texts for _ in range(args.count))
  return Prompts.of(gpt, encoder, repeated, args.negative_prompt)


def _labels(args: Options, gpt: bundle.Transformer) -> Labels:
  """Returns the labels of all images."""
  classes = gpt.config.num_classes
  if gpt.config.condition != "class":
    raise UserError(f"--gpt={args.gpt} is a model of texts: give --prompts and --t5")
  if args.fid_batch:
    labels = fid_batch.choose_labels(args.labels, args.fid_batch, classes, args.seed)
    return Labels(labels, gpt.class_names)
  text = args.classes
  if args.classes_file:
    file = user_path(args.classes_file)
    if not file.exists():
      raise UserError(f"--classes-file={file}: no such file")
    text = read_text(file)
  labels = to_labels(text, gpt.class_names, classes)
  return Labels(np.repeat(np.array(labels, np.int32), args.count), gpt.class_names)


def _settings(
  args: Options,
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  sampled_side: int,
) -> dict[str, Any]:
  """Returns everything that decides the images, for the JSON file next to an npz."""
  return {
    "count": len(job.conditions),
    "image_size": job.image_size,
    "sampled_size": sampled_side,
    "labels": args.labels if args.fid_batch else "given",
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
  names = [job.conditions.name(row) for row in range(len(images))]
  prompts = getattr(job.conditions, "prompts", None)
  if out.suffix not in FILES:
    out.mkdir(parents=True, exist_ok=True)
    if prompts is not None:
      names = [""] * len(images)
      write_captions(out, prompts)
    for row, image in enumerate(images):
      name = "_".join(names[row].split()).replace("/", "-")
      stem = f"{row:05d}_{name}".rstrip("_")
      save_png(out / f"{stem}.png", Image.fromarray(image))
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  if out.suffix == ".npz":
    write_json(fid_batch.settings_path(out), settings)
    save_npz(out, [images], len(images), getattr(job.conditions, "labels", None))
    return
  columns = count if count > 1 else min(len(images), 8)
  labelled = images.shape[1] >= LABELLED_SIDE
  sheet = grid(images, columns, names if labelled else ())
  save_png(out, sheet)
