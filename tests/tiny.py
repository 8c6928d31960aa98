"""Small data sets, configs and runs that several tests share."""

import dataclasses
import io
import json
import pathlib
import tarfile

import ml_collections
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
import sentencepiece

from llamagen_jax import GPTConfig, TokenizerConfig
from llamagen_jax.data.codes import CodeRecord, CodeShardSpec, CodeWriter
from llamagen_jax.sides import image_size_of
from llamagen_jax.text.t5 import T5Config
from llamagen_jax.weights.t5 import save_t5

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
  plan = CodeShardSpec(
    tokenizer="tiny", tokenizer_config={}, image_size=image_size_of(config.grid, 2),
    grid=config.grid, codebook_size=config.vocab_size, crops=("a", "b"),
    class_names=tuple("abcd"), source="random", samples=records, shards=2,
  )  # fmt: skip
  writer, rng = CodeWriter(folder, plan), np.random.default_rng(0)
  for shard in range(plan.shards):
    codes = rng.integers(0, config.vocab_size, (records, 2, config.image_tokens))
    rows = [CodeRecord(f"{i}", i % 4, codes[i]) for i in plan.shard_range(shard)]
    writer.write_shard(shard, rows, {})
  writer.finish()
  return folder


def write_images(folder: pathlib.Path, count: int = 12, side: int = 20):
  """Images of blobs in two classes, a little higher than wide."""
  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (3, 3, 3), np.uint8)
    path = folder / f"class{i % 2}" / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(coarse).resize((side, side + 4), Image.Resampling.BICUBIC)
    image.save(path)
  return folder


def run_section(steps: int) -> dict:
  return {
    "steps": steps, "seed": 0, "log_every": 1, "eval_every": 0, "save_every": 100,
    "keep_last": 2, "keep_every": 0,
  }  # fmt: skip


def recipe(config: dict):
  """Returns a dataclass of just these fields."""
  return dataclasses.make_dataclass("Recipe", config)(**config)


def gpt_config(codes: pathlib.Path, steps: int, batch_size: int = 8):
  return ml_collections.ConfigDict({
    "model": dataclasses.asdict(GPT),
    "data": {"codes": str(codes), "eval_codes": str(codes), "batch_size": batch_size},
    "optimizer": {"lr": 1e-2, "weight_decay": 0.05, "ema": 0.9, "warmup_steps": 2},
    "sampling": {"guidance_scale": 2.0},
    "mesh": {"data": -1},
    "run": run_section(steps),
  })  # fmt: skip


def tokenizer_config(
  images: pathlib.Path, steps: int, batch_size: int = 4, disc_start: int = 0
):
  """With a discriminator that learns a step before it acts, if it does not at once."""
  return ml_collections.ConfigDict({
    "model": dataclasses.asdict(TOKENIZER),
    "loss": {
      "reconstruction": "l1", "adversarial_weight": 0.5, "adaptive_weight": True,
      "disc_start": disc_start, "disc_warmup_steps": min(1, disc_start),
    },
    "discriminator": {"width": 4, "layers": 1},
    "discriminator_optimizer": {"lr": 1e-3},
    "data": {
      "source": f"folder:{images}", "eval_source": f"folder:{images}",
      "image_size": SIDE, "batch_size": batch_size,
    },
    "optimizer": {"lr": 1e-3, "ema": 0.9},
    "mesh": {"data": -1},
    "run": run_section(steps),
  })  # fmt: skip


def write_config(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes a config as a file for --config."""
  path.write_text(
    "import ml_collections\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict({config.to_dict()!r})\n"
  )


CAPTIONS = (
  "a red fox on a green hill", "two blue birds", "a house by the sea at night",
  "the yellow sun over a white mountain", "a cat", "an old man reads a small book",
)  # fmt: skip


def write_t5(folder: pathlib.Path, config: T5Config, params) -> pathlib.Path:
  """A folder of T5 with a vocabulary of pieces of CAPTIONS."""
  save_t5(folder, config, params)
  return write_vocabulary(folder)


def write_vocabulary(folder: pathlib.Path) -> pathlib.Path:
  """spiece.model of pieces of CAPTIONS, with the special tokens of T5."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS * 5), model_writer=model, vocab_size=60,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
    minloglevel=2,
  )  # fmt: skip
  (folder / "spiece.model").write_bytes(model.getvalue())
  return folder


def write_sharded(folder: pathlib.Path, tensors: dict, files: int) -> None:
  """Safetensors in several files and their index, as big models are published."""
  places = {}
  for i in range(files):
    name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    part = {n: tensors[n] for n in sorted(tensors)[i::files]}
    save_file(part, folder / name)
    places |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def image_bytes(seed: int, size: tuple[int, int] = (20, 24), kind="JPEG") -> bytes:
  rng = np.random.default_rng(seed)
  image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
  file = io.BytesIO()
  image.resize(size, Image.Resampling.BICUBIC).save(file, format=kind)
  return file.getvalue()


def write_tar(path: pathlib.Path, first: int, count: int, extra: dict | None = None):
  """A webdataset tar as img2dataset writes it; `extra` adds or replaces members."""
  members = {}
  for i in range(first, first + count):
    key, caption = f"{i:09d}", CAPTIONS[i % len(CAPTIONS)]
    short = {"key": key, "caption": "", "top_caption": caption[:6]}
    members |= {
      f"{key}.jpg": image_bytes(i),
      f"{key}.json": json.dumps(short).encode(),
      f"{key}.txt": caption.encode(),
    }
  members |= extra or {}
  with tarfile.open(path, "w") as tar:
    for name in sorted(members):
      info = tarfile.TarInfo(name)
      info.size = len(members[name])
      tar.addfile(info, io.BytesIO(members[name]))
  return path
