"""Class-conditional transformer over the codes of digits, the quickstart's second.

llamagen train-gpt --config=configs/c2i_digits.py \\
    --config.data.codes=quickstart/codes/train \\
    --config.data.eval_codes=quickstart/codes/val --workdir=gpt
"""

import dataclasses

import ml_collections

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.training.recipe import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`fast` trains for a smoke test only."""
  fast = parse_arg(arg, fast=False).fast
  config = ml_collections.ConfigDict()
  model = GPTConfig(
    layers=4,
    heads=2,
    dim=128,
    grid=8,
    vocab_size=128,
    ffn_multiple=32,
    num_classes=10,
    prefix_rope="identity",
    embedding_dropout=0.0,  # the crops keep it from overfitting
    residual_dropout=0.0,
    condition_dropout=0.1,
  )
  config.model = dataclasses.asdict(model)
  config.data = {
    "codes": "quickstart/codes/train",
    "eval_codes": "quickstart/codes/val",
    "batch_size": 16 if fast else 32,
    "workers": 0,
  }
  config.optimizer = {
    "lr": 4e-3,
    "schedule": "cosine",
    "warmup_steps": 3 if fast else 50,
    "b2": 0.95,
    "weight_decay": 0.05,
    "clip": 1.0,
  }
  config.sampling = {"guidance_scale": 2.5, "top_p": 0.8}
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 5 if fast else 1000,
    "seed": 0,
    "log_every": 5,
    "eval_every": 500,
    "save_every": 400,
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
