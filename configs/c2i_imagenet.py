"""Class-conditional transformer on the codes of ImageNet: B .. 7B at 256 or 384.

llamagen extract-codes --tokenizer=vq16/bundle --source=folder:/data/imagenet/train \\
    --image-size=384 --out=/data/codes384
llamagen train-gpt --config=configs/c2i_imagenet.py:L,image_size=384 \\
    --config.data.codes=/data/codes384 --config.data.eval_codes=/data/codes384_val \\
    --workdir=gs://bucket/L384

The published recipe: AdamW, 1e-4 constant at batch 256, 300 epochs. The loss starts
at ln 16384 = 9.704; L at 256 is reported to reach about 7.86 after 50 epochs.
compile-for-pod says that these fit, with the hours that 300 epochs take at least:
B at 256 on v5e:2x4 (22 h), L at 384 on v5e:4x4 (148 h), XXL at 384 on v5e:8x8
(126 h), 3B at 384 on v5e:8x16 (215 h).
`:runlocal` shrinks model and run to a laptop; the codes must be of 64x64 pictures.
"""

import dataclasses

import ml_collections

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.interop.published import PUBLISHED
from llamagen_jax.training.recipe import parse_arg

IMAGENET_PICTURES = 1_281_167


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`B`, `L`, `XL`, `XXL`, `3B` .., `image_size=`, `epochs=`, `runlocal`."""
  arg = parse_arg(arg, variant="B", image_size=256, epochs=300, runlocal=False)
  local = arg.runlocal
  batch_size = 8 if local else 256
  config = ml_collections.ConfigDict()

  # Shape of the model; every field of GPTConfig can be overridden.
  small = {"layers": 4, "heads": 4, "dim": 128}
  model = GPTConfig.preset(
    arg.variant,
    image_size=64 if local else arg.image_size,
    dtype="float32" if local else "bfloat16",
    remat="none" if local else "dots",
  )
  config.model = dataclasses.asdict(model) | (small if local else {})

  config.data = {
    "codes": "/data/codes",  # folder that extract-codes wrote
    "eval_codes": "/data/codes_val",
    "batch_size": batch_size,  # over all hosts
    "workers": 0 if local else 4,  # reading processes on every host
  }

  config.optimizer = {
    "lr": 1e-4,  # for batch 256
    "schedule": "constant",
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.05,  # on matrices and embeddings
    "clip": 1.0,
    "ema": 0.0,
  }

  # What the finished model is drawn with when nothing else is asked for.
  published = PUBLISHED.get(f"c2i_{arg.variant}_{arg.image_size}")
  scale = published.guidance_scale if published else 2.0
  config.sampling = {"guidance_scale": scale, "top_k": 0, "temperature": 1.0}

  # Optimiser and weights of the large ones are spread over all chips.
  large = arg.variant in ("XXL", "XXXL", "3B", "7B") and not local
  config.mesh = {"data": 1 if large else -1, "fsdp": -1 if large else 1, "tensor": 1}
  config.run = {
    "steps": 20 if local else arg.epochs * IMAGENET_PICTURES // batch_size,
    "seed": 0,
    "log_every": 1 if local else 50,
    "eval_every": 10 if local else 10_000,
    "save_every": 10 if local else 5_000,
    "keep_last": 2,
    "keep_every": 0 if local else 100_000,
  }
  return config
