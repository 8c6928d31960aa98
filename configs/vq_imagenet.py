"""VQ tokenizer on ImageNet pictures of 256x256: VQ-16 or VQ-8.

llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16 \\
    --config.data.source=folder:/data/imagenet/train \\
    --config.data.eval_source=folder:/data/imagenet/val --workdir=gs://bucket/vq16

`:runlocal` shrinks model, pictures and run to a laptop.
"""

import dataclasses

import ml_collections

from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training.recipe import parse_arg

IMAGENET_PICTURES = 1_281_167


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`VQ-16` or `VQ-8`, `image_size=`, `runlocal`."""
  arg = parse_arg(arg, variant="VQ-16", image_size=256, runlocal=False)
  local = arg.runlocal
  small = {"width": 32, "res_blocks": 1, "latent_width": 32, "codebook_size": 512}
  batch_size = 4 if local else 128
  epochs = 40
  config = ml_collections.ConfigDict()

  # Shape of the networks; every field of TokenizerConfig can be overridden.
  model = TokenizerConfig.preset(arg.variant, **(small if local else {}))
  config.model = dataclasses.asdict(model)

  # Weights of the loss terms; those of the quantizer are in `model`.
  config.loss = {"reconstruction": "l2", "reconstruction_weight": 1.0}

  config.data = {
    "source": "folder:/data/imagenet/train",
    "eval_source": "folder:/data/imagenet/val",
    "image_size": 64 if local else arg.image_size,
    "batch_size": batch_size,  # over all hosts
    "largest_resize": 1.25,  # random crops from shorter sides of 256 .. 320
    "mirror": True,
    "min_side": 16,  # smaller pictures are bad ones
    "max_bad_share": 0.001,  # bad pictures that are replaced before the run fails
    "workers": 0 if local else 16,  # decoding processes on every host
  }

  config.optimizer = {
    "lr": 1e-4,  # for batch 128; constant in the published recipe
    "schedule": "constant",
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.0,
    "clip": 1.0,
    "ema": 0.0 if local else 0.9999,  # the bundle holds the average
  }

  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
  config.run = {
    "steps": 20 if local else epochs * IMAGENET_PICTURES // batch_size,
    "seed": 0,
    "log_every": 1 if local else 50,
    "eval_every": 10 if local else 10_000,
    "save_every": 10 if local else 5_000,
    "keep_last": 2,
    "keep_every": 0 if local else 100_000,
  }
  return config
