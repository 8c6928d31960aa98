"""VQ tokenizer for one's own images; sizes and codebook are chosen from the data.

llamagen train-tokenizer --config=configs/vq_folder.py:/data/images --workdir=vq
llamagen extract-codes --tokenizer=vq/bundle --source=folder:/data/images \\
    --image-size=SIZE --out=codes          # the size that the first command names
llamagen train-gpt --config=configs/c2i_folder.py:codes --workdir=gpt
llamagen sample --gpt=gpt/bundle --tokenizer=vq/bundle --classes=0-9 --out=x.png

The log says what was chosen: the side of the images from their sizes, the codebook from
their number. `eval=FOLDER` holds images out; without it a folder `val` or `test` beside
one named `train` is taken, or else the training images. `image_size=` and `codebook=`
choose otherwise, `steps=` trains longer or shorter. `:FOLDER,small` is for a laptop: on
two cores about half a second a step at 64 pixels.
"""

import dataclasses

from absl import logging
import ml_collections

from llamagen_jax.data.sources import open_source
from llamagen_jax.data.survey import SIDES, held_out_beside, survey
from llamagen_jax.errors import UserError
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training.recipe import parse_arg

EPOCHS = 40
FEWEST_STEPS, MOST_STEPS = 3000, 200_000
SMALL_STEPS = 1000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`FOLDER`, `eval=FOLDER`, `image_size=`, `codebook=`, `steps=`, `small`."""
  arg = parse_arg(
    arg, variant="", eval="", image_size=0, codebook=0, steps=0, small=False
  )
  if not arg.variant:
    raise UserError("configs/vq_folder.py: expected vq_folder.py:FOLDER, of images")
  return make_config(
    arg.variant, arg.eval, image_size=arg.image_size, codebook=arg.codebook,
    steps=arg.steps, small=arg.small,
  )  # fmt: skip


def make_config(
  folder: str, held_out: str = "", *, image_size: int = 0, codebook: int = 0,
  steps: int = 0, small: bool = False,
) -> ml_collections.ConfigDict:  # fmt: skip
  """Returns the config for a folder of images; 0 stands for a choice by the data."""
  source = f"folder:{folder}"
  found = survey(open_source(source), source)
  size = image_size or found.image_size
  downsample = max((d for side, d in SIDES.items() if side <= size), default=4)
  if size % downsample:
    raise UserError(f"image_size={size}: expected a multiple of {downsample}")
  rows = codebook or found.codebook_size((size // downsample) ** 2)
  batch_size = 32 if small else 64
  epochs = EPOCHS * found.images // batch_size
  steps = steps or (
    SMALL_STEPS if small else max(FEWEST_STEPS, min(epochs, MOST_STEPS))
  )
  eval_source = f"folder:{held_out or held_out_beside(folder)}"
  logging.info("vq_folder: %s", found)
  logging.info(
    "vq_folder chose: images of %dx%d, %dx%d codes of a codebook of %d, %d steps of %d"
    " images; evaluated on %s",
    size, size, size // downsample, size // downsample, rows, steps, batch_size,
    eval_source if eval_source != source else "the training images: none are held out",
  )  # fmt: skip

  config = _settings(steps, small)
  config.model = dataclasses.asdict(_model(downsample, rows, small))
  config.data = {
    "source": source,
    "eval_source": eval_source,
    "image_size": size,
    "batch_size": batch_size,
    "max_resize": 1.1,
    "random_flip": False,  # turn it on where a mirrored image is one of the same kind
    "min_side": min(16, found.sides[0]),
    "max_bad_share": 0.05,
    "workers": 0 if small else 4,
  }
  return config


def _model(downsample: int, rows: int, small: bool) -> TokenizerConfig:
  multipliers = {4: (1, 1, 2), 8: (1, 1, 2, 2), 16: (1, 1, 2, 2, 4)}[downsample]
  shape = {"width": 64, "res_blocks": 2, "latent_width": 128, "norm_groups": 32}
  if small:
    shape = {"width": 16, "res_blocks": 1, "latent_width": 32, "norm_groups": 8}
  # The entropy loss keeps a small codebook in use from the first step on.
  entropy_ratio = 0.02 if rows <= 256 else 0.0
  return TokenizerConfig(
    multipliers, codebook_size=rows, entropy_ratio=entropy_ratio, **shape
  )


def _settings(steps: int, small: bool) -> ml_collections.ConfigDict:
  """Returns the sections that do not depend on the images."""
  config = ml_collections.ConfigDict()
  config.loss = {
    "reconstruction": "l2",
    "adversarial_weight": 0.0,  # 0.1 gives sharper images, in twice the time
    "disc_start": steps // 2,
    "disc_warmup_steps": min(500, steps // 10),
  }
  # A codebook that starts where the latents are, and whose dead rows are replaced.
  config.codebook = {"init": "kmeans", "restart_every": max(1, min(50, steps // 10))}
  config.optimizer = {
    "lr": 2e-3 if small else 4e-4,
    "schedule": "cosine",
    "warmup_steps": min(100, steps // 10),
    "clip": 1.0,
    "ema": 0.0 if small else 0.999,
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
