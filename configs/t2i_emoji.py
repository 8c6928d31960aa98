"""Transformer over names and codes of emoji, of `quickstart --emoji`.

llamagen train-gpt --config=configs/t2i_emoji.py \\
    --config.data.codes=quickstart_emoji/codes/train \\
    --config.data.texts=quickstart_emoji/features/train \\
    --config.data.eval_codes=quickstart_emoji/codes/val \\
    --config.data.eval_texts=quickstart_emoji/features/val --workdir=gpt

`:steps=10000` trains longer, `:fast` for a smoke test only.
"""

import dataclasses

import ml_collections

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.training.recipe import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`steps=`, `fast`."""
  arg = parse_arg(arg, steps=2000, fast=False)
  steps = 5 if arg.fast else arg.steps
  config = ml_collections.ConfigDict()
  model = GPTConfig(
    layers=4,
    heads=4,
    dim=128,
    grid=8,
    vocab_size=1024,
    ffn_multiple=32,
    condition="caption",
    caption_tokens=14,
    caption_dim=128,
    prefix_rope="identity",
    embedding_dropout=0.0,
    residual_dropout=0.0,
    condition_dropout=0.1,
  )
  config.model = dataclasses.asdict(model)
  config.data = {
    "codes": "quickstart_emoji/codes/train",
    "texts": "quickstart_emoji/features/train",
    "eval_codes": "quickstart_emoji/codes/val",
    "eval_texts": "quickstart_emoji/features/val",
    "batch_size": 32,
    "workers": 0,
  }
  config.optimizer = {
    "lr": 8e-3,
    "kind": "muon",
    "schedule": "cosine",
    "warmup_steps": min(100, steps // 10),
    "b2": 0.95,
    "weight_decay": 0.05,
    "clip": 1.0,
  }
  # Makes it listen to the name, and not only to the codes before.
  config.objective = {"code_noise": 0.5}
  config.sampling = {"guidance_scale": 1.5, "top_p": 0.2}
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": steps,
    "seed": 0,
    "log_every": 5,
    "eval_every": max(1, steps // 4),
    "save_every": 400,
    "keep_last": 1,
    "keep_every": 0,
  }
  return config
