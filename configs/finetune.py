"""Finetuning a published class-conditional transformer on your own images.

From a folder with a folder of images for every class to samples of them:

llamagen import-weights --hub=vq_ds16_c2i --out=vq16
llamagen import-weights --hub=c2i_L_256 --tokenizer=vq16 --out=L256
llamagen extract-codes --tokenizer=vq16 --source=folder:mine/train --image-size=256 \\
    --out=codes
llamagen extract-codes --tokenizer=vq16 --source=folder:mine/val --image-size=256 \\
    --out=codes_val
llamagen train-gpt --config=configs/finetune.py:L --config.data.codes=codes \\
    --config.data.eval_codes=codes_val --config.model.num_classes=12 \\
    --config.images.tokenizer=vq16 --init-from=L256 --workdir=run
llamagen sample --gpt=run/bundle --tokenizer=vq16 --classes=0,1,2 --out=images

A class starts with the row of the published class of the same name (that of its
folder, or its WordNet id), or else with the mean of all rows; the log says how many
do. Look at run/samples.png: every evaluation writes it anew.

`:L,lora` trains adapters of rank 16 and the class table instead of all weights: a
tenth of the memory for the optimizer. The bundle has them merged. `:L,only=table`
trains nothing but the table. `:L,align` makes guidance needless with images of the
classes that the model knows (CCA, one epoch; published FID 3.43 for 19.07).
`:runlocal` shrinks model and run to a laptop.
"""

import dataclasses

import ml_collections

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.training.recipe import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`B`, `L` .., `image_size=`, `steps=`, `lora`, `only=`, `align`, `runlocal`."""
  arg = parse_arg(
    arg, variant="L", image_size=256, steps=5_000, lora=False, only="all",
    align=False, runlocal=False,
  )  # fmt: skip
  local = arg.runlocal
  config = ml_collections.ConfigDict()

  # Shape of the published model, but for the number of classes.
  small = {"layers": 4, "heads": 4, "dim": 128}
  model = GPTConfig.preset(
    arg.variant,
    image_size=64 if local else arg.image_size,
    num_classes=1000,  # yours; 1 = unconditional, with all images in one folder
    dtype="float32" if local else "bfloat16",
    remat="none" if local else "dots",
  )
  config.model = dataclasses.asdict(model) | (small if local else {})

  config.data = {
    "codes": "codes",  # folders that extract-codes wrote
    "eval_codes": "codes_val",
    "batch_size": 8 if local else 256 if arg.align else 64,  # over all hosts
    "workers": 0,  # reading processes on every host; 0 = threads
  }

  config.train = {
    # all | table (of the classes) | head | none (the adapters alone)
    "only": "table" if arg.lora and arg.only == "all" else arg.only,
    "lora": {
      "rank": 16 if arg.lora else 0,  # 0 = no adapters
      "alpha": 16.0,  # the adapters count alpha / rank
      "targets": ("qkv", "out", "ffn_in", "ffn_out"),  # matrices of every layer
    },
  }

  config.objective = {
    "kind": "contrastive" if arg.align else "likelihood",
    "contrastive_beta": 0.02,  # at 576 codes; other sizes scale it
    # Of the wrong labels; published: B 1000, L 300, XL 1000, XXL 1000, 3B 500.
    "contrastive_lambda": 300.0 if arg.variant == "L" else 1000.0,
  }

  config.optimizer = {
    # Tables and adapters start from nothing and take more.
    "lr": 1e-4 if arg.lora or arg.only != "all" else 1e-5 if arg.align else 2e-5,
    "schedule": "constant",
    "warmup_steps": 0 if arg.align or local else 500,
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.05,  # on matrices and embeddings
    "clip": 1.0,
    "ema": 0.0,  # decay of the average of the weights; 0 = none
  }

  config.images = {
    "tokenizer": "",  # its bundle; then every evaluation samples a grid of images
    "count": 16,
    "seed": 0,
  }
  # What the finished model is sampled with when nothing else is asked for.
  scale = 1.0 if arg.align else 2.0
  config.sampling = {"guidance_scale": scale, "top_k": 0, "temperature": 1.0}

  # fsdp=-1 for XL and larger
  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 20 if local else arg.steps,
    "seed": 0,
    "log_every": 1 if local else 20,
    "eval_every": 10 if local else 500,
    "save_every": 10 if local else 500,
    "keep_last": 2,
    "keep_every": 0,  # a checkpoint to keep for good, every so many steps
  }
  # The model to start from; --init-from says it.
  config.init_from = "" if not arg.align else "L256"
  return config
