"""VQ tokenizer for 32x32 handwritten digits, the quickstart's first step.

llamagen train-tokenizer --config=configs/vq_digits.py \\
    --config.data.source=folder:quickstart/digits/train \\
    --config.data.eval_source=folder:quickstart/digits/val --workdir=tokenizer

`:gan` adds a small PatchGAN after 300 steps and trains to 600; `:rows=512` has a larger
codebook, without the entropy term that keeps the small one in use, and `:alive` keeps
it in use by starting from k-means and replacing dead rows.
"""

import dataclasses

import ml_collections

from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training.recipe import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`fast` trains for a smoke test only; `coloured`, `gan`, `rows=`, `alive`."""
  arg = parse_arg(arg, fast=False, coloured=False, gan=False, rows=0, alive=False)
  fast, coloured = arg.fast, arg.coloured
  steps = 600 if arg.gan or coloured else 300
  rows = arg.rows or (32 if coloured else 128)
  config = ml_collections.ConfigDict()
  model = TokenizerConfig(
    channel_multipliers=(1, 1, 2),  # downsample 4: 64 codes a digit
    width=16,
    res_blocks=1,
    latent_width=32,
    codebook_size=rows,
    codebook_dim=8,
    norm_groups=8,
    # Keeps the small codebook in use from the first step on.
    entropy_ratio=0.02 if rows <= 256 else 0.0,
  )
  config.model = dataclasses.asdict(model)
  config.loss = {
    "reconstruction": "l2",
    "adversarial_weight": 0.01 if arg.gan else 0.0,
    "disc_start": 300,
    "disc_warmup_steps": 50,
  }
  config.discriminator = {"width": 32, "layers": 2}
  config.codebook = {
    "init": "kmeans" if arg.alive else "uniform",
    "restart_every": 50 if arg.alive else 0,
  }
  config.data = {
    "source": "folder:quickstart/digits/train",
    "eval_source": "folder:quickstart/digits/val",
    "image_size": 24 if coloured else 32,
    "batch_size": 16 if fast else 32,
    "max_resize": 1.1 if coloured else 1.2,
    "random_flip": False,  # mirrored digits are no digits
    "min_side": 16,
    "max_bad_share": 0.01,
    "workers": 0,
  }
  config.optimizer = {
    "lr": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 3 if fast else 10,
    "clip": 1.0,
  }
  config.discriminator_optimizer = {"lr": 1e-4}
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 5 if fast else steps,
    "seed": 0,
    "log_every": 5,
    "eval_every": 150,
    "save_every": 200,
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
