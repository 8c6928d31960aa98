"""Caption-conditional transformer: LAION-COCO at 256, then fine images at 512.

llamagen prepare-captions --source='webdataset:/data/laion-coco/*.tar' \\
    --short-key=top_caption --min-side=256 --out=/data/captions
llamagen extract-codes --tokenizer=vq16/bundle --source=captions:/data/captions \\
    --crops=center --ranges=1 --no-mirror --image-size=256 --out=/data/codes256
llamagen extract-text --t5=/data/flan-t5-xl --captions=/data/captions \\
    --out=/data/features
llamagen train-gpt --config=configs/t2i_laion.py:stage1 --workdir=gs://bucket/t2i1 \\
    --config.data.codes=/data/codes256 --config.data.eval_codes=/data/codes256_val \\
    --config.data.texts=/data/features --config.data.eval_texts=/data/features_val

The first three once more for some held-out pairs (`_val`), and all of them for the
images of stage 2, with --min-side=512 and --image-size=512:

llamagen train-gpt --config=configs/t2i_laion.py:stage2 --workdir=gs://bucket/t2i2 \\
    --init-from=gs://bucket/t2i1 \\
    --config.data.codes=/data/codes512 --config.data.eval_codes=/data/codes512_val \\
    --config.data.texts=/data/features512 \\
    --config.data.eval_texts=/data/features512_val

Features take 4 kB a token: a caption of 30 tokens 123 kB, 123 GB per million. Without
that store, give data.t5 the folder of the encoder and data.texts the captions.

The published recipe: XL, AdamW, 1e-4 constant at batch 256; stage 1 sees 50 M pairs,
stage 2 10 M pairs of high aesthetic score, where the short caption takes the long
one's place with probability 0.3. The loss starts at ln 16384 = 9.704.
compile-for-pod says that XL fits, with the hours that a stage takes at least, and with
flan-t5-xl running along instead of stored features:

    :stage1  v5e:8x8 2.0 h, 2.3 h with T5; v5p:4x4x4 1.0 h, 1.2 h
    :stage2  v5e:8x8 2.6 h, 2.7 h with T5; v5p:4x4x4 0.9 h, 0.9 h

`:runlocal` shrinks model and run to a laptop; the codes must be of 64x64 images.
"""

import dataclasses

import ml_collections

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.training.recipe import parse_arg

# stage: (side of the images, pairs to see, probability of the short caption)
STAGES = {"stage1": (256, 50_000_000, 0.0), "stage2": (512, 10_000_000, 0.3)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`stage1` or `stage2`, `model=`, `runlocal`."""
  arg = parse_arg(arg, variant="stage1", model="XL", runlocal=False)
  if arg.variant not in STAGES:
    raise UserError(f"config argument {arg.variant!r}: expected stage1 or stage2")
  image_size, pairs, short_share = STAGES[arg.variant]
  local = arg.runlocal
  batch_size = 8 if local else 256
  config = ml_collections.ConfigDict()

  # Shape of the model; every field of GPTConfig can be overridden.
  small = {"layers": 4, "heads": 4, "dim": 128}
  model = GPTConfig.preset(
    arg.model,
    image_size=64 if local else image_size,
    condition="caption",
    caption_tokens=120,
    caption_dim=2048,  # of flan-t5-xl
    prefix_rope="identity",  # the released weights have "zero"
    dtype="float32" if local else "bfloat16",
    remat="none" if local else "dots",
  )
  config.model = dataclasses.asdict(model) | (small if local else {})

  config.data = {
    "codes": "/data/codes",  # folder that extract-codes wrote
    "eval_codes": "/data/codes_val",
    "texts": "/data/features",  # extract-text's, or prepare-captions' with t5
    "eval_texts": "/data/features_val",
    "t5": "",  # folder of the encoder, to run it along in training
    "t5_dtype": "bfloat16",
    "short_share": short_share,
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

  # What the finished model is sampled with when nothing else is asked for.
  config.sampling = {"guidance_scale": 7.5, "top_k": 1000, "temperature": 1.0}

  # Weights and optimiser, and a T5 that runs along, are spread over four chips.
  config.mesh = {"data": -1, "fsdp": 1 if local else 4, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 20 if local else pairs // batch_size,
    "seed": 0,
    "log_every": 1 if local else 50,
    "eval_every": 10 if local else 10_000,
    "save_every": 10 if local else 5_000,
    "keep_last": 2,
    "keep_every": 0 if local else 50_000,
  }
  return config
