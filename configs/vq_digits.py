"""VQ tokenizer for 32x32 handwritten digits, the quickstart's first step.

llamagen train-tokenizer --config=configs/vq_digits.py \\
    --config.data.source=folder:quickstart/digits/train \\
    --config.data.eval_source=folder:quickstart/digits/val --workdir=tokenizer
"""

import dataclasses

import ml_collections

from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training.recipe import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`fast` trains for a smoke test only."""
  fast = parse_arg(arg, fast=False).fast
  config = ml_collections.ConfigDict()
  model = TokenizerConfig(
    channel_multipliers=(1, 1, 2),  # downsample 4: 64 codes a digit
    width=16,
    res_blocks=1,
    latent_width=32,
    codebook_size=128,
    codebook_dim=8,
    norm_groups=8,
    entropy_ratio=0.02,  # keeps the codebook in use from the first step on
  )
  config.model = dataclasses.asdict(model)
  config.loss = {"reconstruction": "l2"}
  config.data = {
    "source": "folder:quickstart/digits/train",
    "eval_source": "folder:quickstart/digits/val",
    "image_size": 32,
    "batch_size": 16 if fast else 32,
    "largest_resize": 1.2,
    "mirror": False,  # mirrored digits are no digits
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
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
  config.run = {
    "steps": 5 if fast else 300,
    "seed": 0,
    "log_every": 5,
    "eval_every": 150,
    "save_every": 200,
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
