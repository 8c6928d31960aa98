"""Class-conditional transformer over codes of one's own images.

llamagen train-gpt --config=configs/c2i_folder.py:codes --workdir=gpt

`codes` is the folder that extract-codes wrote. Grid, vocabulary and classes are those
of the codes; the size of the model and the number of steps follow from the number of
images, and the log says what was chosen. `eval=FOLDER` holds codes out; without it a
folder `val` or `test` beside one named `train` is taken, or else the training codes.
`steps=` trains longer or shorter, `:codes,small` is for a laptop. `also=FOLDER+FOLDER`
adds codes of images of other sizes, a folder for each; `eval=` then names as many.
"""

from collections.abc import Sequence
import dataclasses

from absl import logging
import ml_collections

from llamagen_jax.data.codes import CodeSource
from llamagen_jax.data.survey import held_out_beside
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.sides import show_grid
from llamagen_jax.training.recipe import parse_arg

EPOCHS = 60
FEWEST_STEPS, MOST_STEPS = 3000, 300_000
SMALL_STEPS = 1000
# images: (layers, heads, dim) of the model, from so many images on
SHAPES = {0: (6, 6, 384), 50_000: (12, 8, 512), 500_000: (12, 12, 768)}
SMALL = (4, 2, 128)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`CODES`, `also=CODES+CODES`, `eval=CODES`, `steps=`, `small`."""
  arg = parse_arg(arg, variant="", also="", eval="", steps=0, small=False)
  if not arg.variant:
    raise UserError(
      "configs/c2i_folder.py: expected c2i_folder.py:FOLDER, of the codes that"
      " extract-codes wrote"
    )
  codes = [arg.variant, *filter(None, arg.also.split("+"))]
  held_out = list(filter(None, arg.eval.split("+")))
  return make_config(codes, held_out, steps=arg.steps, small=arg.small)


def make_config(
  codes: Sequence[str],
  held_out: Sequence[str] = (),
  *,
  steps: int = 0,
  small: bool = False,
) -> ml_collections.ConfigDict:
  """Returns the config for folders of codes; 0 stands for a choice by the data."""
  sources = [CodeSource(folder) for folder in codes]
  manifest = sources[0].manifest
  labels = [int(label) for s in sources for label in s.manifest["label_counts"]]
  if not labels or min(labels) < 0:
    raise UserError(
      f"configs/c2i_folder.py: {' or '.join(codes)} has images without a class; put"
      " each class into a folder of its own, or all images into one, such as images/all"
    )
  classes = max(len(manifest["class_names"]), max(labels) + 1)
  records = sum(len(source) for source in sources)
  layers, heads, dim = max((n, shape) for n, shape in SHAPES.items() if n <= records)[1]
  if small:
    layers, heads, dim = SMALL
  batch_size = 32 if small else 64
  epochs = EPOCHS * records // batch_size
  steps = steps or (
    SMALL_STEPS if small else max(FEWEST_STEPS, min(epochs, MOST_STEPS))
  )
  held_out = held_out or [held_out_beside(folder) for folder in codes]
  grid, *other_grids = (source.grid for source in sources)
  logging.info(
    "c2i_folder: %d images of %d classes, %s codes of a codebook of %d",
    records, classes,
    " or ".join(show_grid(source.grid) for source in sources),
    manifest["codebook_size"],
  )  # fmt: skip
  logging.info(
    "c2i_folder chose: %d layers of width %d, %d steps of %d images; evaluated on %s",
    layers, dim, steps, batch_size,
    "the training codes: none are held out" if held_out == codes
    else " and ".join(held_out),
  )  # fmt: skip

  config = _settings(steps, small)
  dropout = 0.0 if small else 0.1  # a small model is kept from overfitting by the crops
  config.model = dataclasses.asdict(
    GPTConfig(
      layers, heads, dim,
      grid=grid,
      other_grids=tuple(other_grids),
      vocab_size=manifest["codebook_size"],
      num_classes=classes,
      ffn_multiple=32,
      prefix_rope="identity",
      embedding_dropout=dropout,
      residual_dropout=dropout,
      condition_dropout=0.1,
    )
  )  # fmt: skip
  config.data = {
    "codes": ",".join(codes),
    "eval_codes": ",".join(held_out),
    "batch_size": batch_size,
    "workers": 0,
  }
  config.sampling = {"guidance_scale": 2.0 if classes > 1 else 1.0, "top_p": 0.9}
  return config


def _settings(steps: int, small: bool) -> ml_collections.ConfigDict:
  """Returns the sections that do not depend on the codes."""
  config = ml_collections.ConfigDict()
  config.optimizer = {
    "lr": 4e-3 if small else 1e-3,
    "schedule": "cosine",
    "warmup_steps": min(100, steps // 10),
    "b2": 0.95,
    "weight_decay": 0.05,
    "clip": 1.0,
  }
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
  config.run = {
    "steps": steps,
    "seed": 0,
    "log_every": 5 if small else 50,
    "eval_every": max(1, steps // 4),
    "save_every": min(200 if small else 2000, max(1, steps // 2)),
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
