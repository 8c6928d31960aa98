"""Transformer over captions and codes of coloured digits, of `quickstart --text`.

llamagen train-gpt --config=configs/t2i_digits.py \\
    --config.data.codes=quickstart/codes/train \\
    --config.data.texts=quickstart/features/train \\
    --config.data.eval_codes=quickstart/codes/val \\
    --config.data.eval_texts=quickstart/features/val --workdir=gpt
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
    heads=8,  # a word each for some of them
    dim=128,
    grid=6,
    vocab_size=32,
    ffn_multiple=32,
    condition="caption",
    caption_tokens=12,
    caption_dim=64,
    prefix_rope="identity",
    embedding_dropout=0.0,
    residual_dropout=0.0,
    condition_dropout=0.1,
  )
  config.model = dataclasses.asdict(model)
  config.data = {
    "codes": "quickstart/codes/train",
    "texts": "quickstart/features/train",
    "eval_codes": "quickstart/codes/val",
    "eval_texts": "quickstart/features/val",
    "batch_size": 16 if fast else 32,
    "workers": 0,
  }
  config.optimizer = {
    "lr": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 3 if fast else 50,
    "b2": 0.95,
    "weight_decay": 0.05,
    "clip": 1.0,
  }
  config.sampling = {"guidance_scale": 2.5, "top_p": 0.7}
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 5 if fast else 3000,
    "seed": 0,
    "log_every": 5,
    "eval_every": 500,
    "save_every": 400,
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
