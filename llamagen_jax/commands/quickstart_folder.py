"""The part of `llamagen quickstart --folder`: the whole pipeline on one's own images.

Images -> VQ tokenizer -> codes -> class-conditional transformer -> samples, within a
budget of minutes: both trainings are timed for a few steps, and then take as many as
fit. A rerun goes on with the first step that is not finished, with the same choices.
"""

import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np
import tqdm

from llamagen_jax.commands import budget
from llamagen_jax.commands.budget import Choices
from llamagen_jax.commands.extract_codes import Encoder, extract
from llamagen_jax.configs import (  # pyright: ignore[reportMissingImports]
  c2i_folder,
  vq_folder,
)
from llamagen_jax.data.images import (
  BadImage,
  CropSet,
  ImageDecoder,
  resize_to_cover,
)
from llamagen_jax.data.sources import NO_LABEL, FolderSource, open_source
from llamagen_jax.data.survey import survey
from llamagen_jax.errors import UserError
from llamagen_jax.images import grid, save_png
from llamagen_jax.sampling.sample import sample
from llamagen_jax.storage import atomic_folder
from llamagen_jax.training import train_gpt, train_tokenizer
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.loop import Task
from llamagen_jax.training.tokenizer_step import TokenizerRecipe
from llamagen_jax.weights import bundle

IMAGES_A_MINUTE = 250  # that are used, at most: the rest of the folder is left out
LARGEST_SIDE = 64  # larger images are made smaller, so that 64 codes stand for one
HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 500
FEWEST = 8  # images that a run needs
SHARES = {"tokenizer": 0.35, "gpt": 0.45}  # of the minutes; the rest is for the others
MOST_STEPS = {"tokenizer": 4000, "gpt": 20_000}
MOST_EPOCHS = 200
GRID_CLASSES, GRID_ROWS = 10, 8


def run(workdir: pathlib.Path, folder: str, minutes: float, step: Any) -> None:
  """Runs what is not finished; `step` is the quickstart's own, and names each part."""
  choices = Choices(workdir, {"images": str(folder), "minutes": minutes})
  with step("images", f"copies of the images of {folder}, as small as they are needed"):
    most = max(FEWEST, int(IMAGES_A_MINUTE * minutes))
    size = write_images(workdir / "images", folder, choices, most)
  with step("tokenizer", "train the VQ tokenizer"):
    budget.train(
      workdir / "tokenizer", train_tokenizer, TokenizerRecipe,
      lambda steps: vq_folder.make_config(
        f"{workdir}/images/train", image_size=size, steps=steps, small=_small()
      ),
      choices, lambda task: _steps("tokenizer", task, minutes),
    )  # fmt: skip
  with step("codes", "images to codes"):
    for split in _splits(workdir / "images"):
      _extract(workdir, split, size)
  with step("gpt", "train the transformer on the codes"):
    budget.train(
      workdir / "gpt", train_gpt, GPTRecipe,
      lambda steps: c2i_folder.make_config(
        [f"{workdir}/codes/train"], steps=steps, small=_small()
      ),
      choices, lambda task: _steps("gpt", task, minutes),
    )  # fmt: skip
  with step("samples", "generate images of each class"):
    write_samples(workdir)
  print(
    f"\nLook at {workdir}/samples.png, {workdir}/tokenizer/reconstructions.png and"
    f" {workdir}/gpt/loss.png\nMore images: llamagen sample --classes=0"
    f" --gpt={workdir}/gpt/bundle --tokenizer={workdir}/tokenizer/bundle --out=x.png\n"
    f"A server: llamagen serve --workdir={workdir}"
  )


def write_images(
  folder: pathlib.Path, source_folder: str, choices: Choices, most: int
) -> int:
  """Writes small RGB copies of `most` images as train/CLASS/*.png and val/CLASS/*.png.

  Returns:
    the side of the images that are trained on.
  """
  name = f"folder:{source_folder}"
  source = FolderSource(source_folder)
  found = survey(source, name)
  size = choices.get("image_size", lambda: min(found.image_size, LARGEST_SIDE))
  if folder.exists():
    return size
  logging.info("%s: %s", name, found)
  splits = split(_labels(source), most)
  with atomic_folder(folder) as part:
    written = {
      name: _copy(source, rows, part / name, size) for name, rows in splits.items()
    }
    if written["train"] < FEWEST:
      raise UserError(
        f"--folder={source_folder}: {written['train']} usable images, expected at least"
        f" {FEWEST}"
      )
  logging.info(
    "chose %d of %d images for training, %d held out, %dx%d pixels",
    written["train"], len(source), written["val"], size, size,
  )  # fmt: skip
  return size


def _labels(source: FolderSource) -> np.ndarray:
  """Returns the class of each image; all are of class 0 where there are no classes."""
  if not source.class_names:
    return np.zeros(len(source), int)
  return np.array(source.labels)


def split(labels: np.ndarray, most: int) -> dict[str, np.ndarray]:
  """Returns indices of the images to train on and to hold out, class by class.

  Every class gives the same number of images where it has them, `most` in all.
  """
  rng, chosen = np.random.default_rng(0), {"train": [], "val": []}
  classes, counts = np.unique(labels[labels != NO_LABEL], return_counts=True)
  room, left = most, len(classes)
  for index in np.argsort(counts, kind="stable"):  # small classes leave room to others
    rows = rng.permutation(np.flatnonzero(labels == classes[index]))
    rows = rows[: max(1, room // left)]
    held_out = min(int(len(rows) * HELD_OUT_SHARE), MOST_HELD_OUT // len(classes))
    chosen["val"] += [*rows[:held_out]]
    chosen["train"] += [*rows[held_out:]]
    room, left = room - len(rows), left - 1
  return {split: np.sort(np.array(rows, int)) for split, rows in chosen.items()}


def _copy(
  source: FolderSource, rows: np.ndarray, folder: pathlib.Path, size: int
) -> int:
  """Writes images, a little larger than the crops of them; returns how many."""
  decoder, names, written = ImageDecoder(), source.class_names or ("images",), 0
  for row in tqdm.tqdm(rows, desc=folder.name, unit="image", dynamic_ncols=True):
    record = source[int(row)]
    try:
      image = decoder(record)
    except BadImage as problem:
      logging.warning("left out %s", problem)
      continue
    if min(image.size) > 1.25 * size:
      image = resize_to_cover(image, round(1.25 * size))
    path = folder / names[max(record.label, 0)] / f"{row:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    written += 1
  return written


def _splits(folder: pathlib.Path) -> list[str]:
  return [split for split in ("train", "val") if (folder / split).is_dir()]


def _steps(name: str, task: Task, minutes: float) -> int:
  """Returns how many steps a training takes in its share of the minutes."""
  epoch = len(task.stream.source) / task.stream.batch_size
  most = min(MOST_STEPS[name], int(MOST_EPOCHS * epoch))
  return budget.steps_in_time(name, task, SHARES[name] * minutes * 60, most)


def _small() -> bool:
  """Returns whether only CPUs are here, for which the small models are."""
  return jax.default_backend() == "cpu"


def _extract(workdir: pathlib.Path, split: str, size: int) -> None:
  out, spec = workdir / "codes" / split, f"folder:{workdir}/images/{split}"
  if (out / "manifest.json").exists():
    return
  extract(
    Encoder(workdir / "tokenizer" / "bundle"), open_source(spec), spec, out,
    CropSet(size, "five", (1.1,), mirror=False), shards=2, batch_size=32,
    decoder=ImageDecoder(), max_bad_share=0.05, workers=0,
  )  # fmt: skip


def write_samples(workdir: pathlib.Path) -> None:
  """Writes samples.png: a column for each of up to ten classes, spread over all."""
  path = workdir / "samples.png"
  if path.exists():
    return
  gpt = bundle.load_gpt(workdir / "gpt" / "bundle")
  tokenizer = bundle.load_tokenizer(workdir / "tokenizer" / "bundle")
  classes = gpt.config.num_classes
  columns = min(classes, GRID_CLASSES)
  shown = [i * classes // columns for i in range(columns)]
  labels = np.tile(shown, GRID_ROWS)
  images = sample(gpt, tokenizer, classes=labels.tolist(), batch_size=len(labels))
  names = [gpt.class_names[i] if i < len(gpt.class_names) else str(i) for i in shown]
  names += [""] * (len(labels) - columns)
  zoom = max(1, 64 // images.shape[1])
  save_png(path, grid(images, columns=columns, labels=names, zoom=zoom))
