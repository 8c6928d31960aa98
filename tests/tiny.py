"""Small data sets, configs and runs that several tests share."""

import dataclasses
import pathlib

import ml_collections
import numpy as np
from PIL import Image

from llamagen_jax import GPTConfig, TokenizerConfig
from llamagen_jax.data.codes import CodePlan, CodeRecord, CodeWriter

GPT = GPTConfig(
  2, 4, 32, grid=3, vocab_size=50, num_classes=4, ffn_multiple=16, drop_path=0.1
)
TOKENIZER = TokenizerConfig(
  (1, 2), width=8, res_blocks=1, latent_width=8, codebook_size=16, codebook_dim=4,
  norm_groups=4, dropout=0.1,
)  # fmt: skip
SIDE = 16


def write_codes(folder: pathlib.Path, records: int = 20, config: GPTConfig = GPT):
  """Code shards of random codes."""
  plan = CodePlan(
    tokenizer="tiny", tokenizer_config={}, image_size=config.grid * 2,
    grid=config.grid, codebook_size=config.vocab_size, crops=("a", "b"),
    class_names=tuple("abcd"), source="random", samples=records, shards=2,
  )  # fmt: skip
  writer, rng = CodeWriter(folder, plan), np.random.default_rng(0)
  for shard in range(plan.shards):
    codes = rng.integers(0, config.vocab_size, (records, 2, config.image_tokens))
    rows = [CodeRecord(f"{i}", i % 4, codes[i]) for i in plan.shard_range(shard)]
    writer.write_shard(shard, rows, [])
  writer.finish()
  return folder


def write_pictures(folder: pathlib.Path, count: int = 12):
  """Pictures of blobs in two classes."""
  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (3, 3, 3), np.uint8)
    path = folder / f"class{i % 2}" / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(coarse).resize((20, 24), Image.Resampling.BICUBIC)
    picture.save(path)
  return folder


def run_section(steps: int) -> dict:
  return {
    "steps": steps, "seed": 0, "log_every": 1, "eval_every": 0, "save_every": 100,
    "keep_last": 2, "keep_every": 0,
  }  # fmt: skip


def gpt_config(codes: pathlib.Path, steps: int, batch_size: int = 8):
  return ml_collections.ConfigDict({
    "model": dataclasses.asdict(GPT),
    "data": {"codes": str(codes), "eval_codes": str(codes), "batch_size": batch_size},
    "optimizer": {"lr": 1e-2, "weight_decay": 0.05, "ema": 0.9, "warmup_steps": 2},
    "sampling": {"guidance_scale": 2.0},
    "mesh": {"data": -1},
    "run": run_section(steps),
  })  # fmt: skip


def tokenizer_config(pictures: pathlib.Path, steps: int, batch_size: int = 4):
  return ml_collections.ConfigDict({
    "model": dataclasses.asdict(TOKENIZER),
    "loss": {"reconstruction": "l1"},
    "data": {
      "source": f"folder:{pictures}", "eval_source": f"folder:{pictures}",
      "image_size": SIDE, "batch_size": batch_size,
    },
    "optimizer": {"lr": 1e-3, "ema": 0.9},
    "mesh": {"data": -1},
    "run": run_section(steps),
  })  # fmt: skip
