"""Class-conditional transformer on the codes of ImageNet: B .. 7B at 256 or 384.

llamagen extract-codes --tokenizer=vq16/bundle --source=folder:/data/imagenet/train \\
    --image-size=384 --ignore-exif --out=/data/codes384
llamagen train-gpt --config=configs/c2i_imagenet.py:L,image_size=384 \\
    --config.data.codes=/data/codes384 --config.data.eval_codes=/data/codes384_val \\
    --workdir=gs://bucket/L384

The published recipe: AdamW, 1e-4 constant at batch 256, 300 epochs. compile-for-pod
says that these fit, and the hours that 300 epochs take at least; 50 epochs,
`:B,epochs=50`, take a sixth:

    :B                   v5e:2x4   12 h
    :B,image_size=384    v5e:2x4   55 h
    :L                   v5e:4x4   18 h
    :L,image_size=384    v5e:4x4   75 h
    :XL,image_size=384   v5e:8x8   32 h
    :XXL,image_size=384  v5e:8x8   58 h, v5p:4x4x4 38 h
    :3B,image_size=384   v5e:8x16 112 h, v5p:4x4x4 83 h
    :L,strong            v5e:8x8    6 h

The loss starts at ln 16384 = 9.704. At 256 after 50 epochs about 7.86 is reported for L
and 7.33 for 1B, at 384 after 300 about 6.9 for XL.
`:L,strong` trains on batches of 2048 with a warm-up, a cosine and QK-norm instead.
`:L,recipe=npp` predicts patches of 2x2 codes in the first half of the steps, at about
0.6 of the cost (published FID 2.76 for 3.80); `:L,recipe=wsd` has its schedule alone.
`:L,recipe=rar` predicts codes in random orders first and in raster order at the end
(published 2.18 for 3.08, of another tokenizer). `:L,recipe=gft` trains a model that
needs no guidance in sampling (published 2.52 at 384), which is half the work.
`:runlocal` shrinks model and run to a laptop; the codes must be of 64x64 images.
"""

import dataclasses

import ml_collections

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.training.recipe import parse_arg
from llamagen_jax.weights.published import PUBLISHED

IMAGENET_IMAGES = 1_281_167


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`B`, `L` .., `image_size=`, `epochs=`, `strong`, `recipe=`, `runlocal`."""
  arg = parse_arg(
    arg, variant="B", image_size=256, epochs=300, strong=False, recipe="",
    runlocal=False,
  )  # fmt: skip
  if arg.recipe not in ("", "npp", "wsd", "rar", "gft"):
    raise UserError(
      f"config argument 'recipe={arg.recipe}': expected npp, wsd, rar or gft"
    )
  local, strong = arg.runlocal, arg.strong or arg.recipe == "rar"
  batch_size = 8 if local else 2048 if strong else 256
  steps = 20 if local else arg.epochs * IMAGENET_IMAGES // batch_size
  config = ml_collections.ConfigDict()

  # Shape of the model; every field of GPTConfig can be overridden.
  small = {"layers": 4, "heads": 4, "dim": 128}
  model = GPTConfig.preset(
    arg.variant,
    image_size=64 if local else arg.image_size,
    dtype="float32" if local else "bfloat16",
    remat="none" if local else "dots",
    qk_norm=strong,  # holds attention's logits down at high learning rates
  )
  config.model = dataclasses.asdict(model) | (small if local else {})

  config.data = {
    "codes": "/data/codes",  # folder that extract-codes wrote
    "eval_codes": "/data/codes_val",
    "batch_size": batch_size,  # over all hosts
    "workers": 0 if local else 4,  # reading processes on every host
  }

  config.optimizer = {
    # Nothing rescales it: when you change the batch size, multiply by the square
    # root of the ratio, as Adam wants (arXiv 2205.10287); 4e-4 is a little more.
    "lr": 4e-4 if strong else 1e-4,  # for batch 2048, 256
    "schedule": "cosine" if strong else "constant",
    "warmup_steps": steps // 50 if strong else 0,
    "final_lr": 1e-5 if strong else 0.0,  # where the cosine ends
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.05,  # on matrices and embeddings
    "clip": 1.0,
    "ema": 0.0,
  }

  config.objective = {
    "label_smoothing": 0.0,  # share of the target spread over all codes
    "z_loss": 0.0,  # weight of log(Z)**2 in what is minimised; 1e-4 is usual
    "accumulate": 1,  # slices of a batch in turn, to save memory
    "kind": "likelihood",  # or guidance-free, contrastive; see configs/finetune.py
    "patch_phases": (),  # first phases, (side of a patch of codes, steps)
    "random_order": (0, 0),  # random orders up to a step, none from another on
  }
  # Steps that leave the weights alone; the log says which.
  config.guard = {
    "skip_nonfinite": False,  # loss or gradient is inf or NaN
    "skip_spike": 0.0,  # loss above its running mean by so many nats; 0 = never
    "max_skipped_in_a_row": 10,  # skipped steps in a row that end the run
  }

  # What the finished model is sampled with when nothing else is asked for.
  published = PUBLISHED.get(f"c2i_{arg.variant}_{arg.image_size}")
  scale = published.guidance_scale if published else 2.0
  config.images = {
    "tokenizer": "",  # its bundle; then every evaluation samples a grid of images
    "count": 16,
  }
  config.sampling = {"guidance_scale": scale, "top_k": 0, "temperature": 1.0}

  # Optimiser and weights of the large ones are spread over all chips: XL at 384 would
  # be over a v5e's 16 GiB by 1.5 otherwise.
  large = arg.variant in ("XL", "1B", "XXL", "XXXL", "3B", "7B") and not local
  config.mesh = {
    "data": 1 if large else -1,
    "fsdp": -1 if large else 1,
    "tensor": 1,
    "slices": -1,
  }
  config.run = {
    "steps": steps,
    "seed": 0,
    "log_every": 1 if local else 50,
    "eval_every": 10 if local else 10_000,
    "save_every": 10 if local else 5_000,
    "keep_last": 2,
    "keep_every": 0 if local else 100_000,
    "tracker": "none",  # or wandb, trackio: the log goes there, too
  }
  RECIPES.get(arg.recipe, lambda *_: None)(config, steps)
  return config


def next_patch_prediction(config: ml_collections.ConfigDict, steps: int) -> None:
  """Patches of 2x2 codes for the first half of the steps (arXiv 2412.15321)."""
  config.objective.patch_phases = ((2, steps // 2),)  # deeper: ((4, ..), (2, ..))
  warmup_stable_decay(config, steps)


def warmup_stable_decay(config: ml_collections.ConfigDict, steps: int) -> None:
  """Next-patch prediction's schedule; of every phase where there are several."""
  epoch = IMAGENET_IMAGES // config.data.batch_size
  config.optimizer.update(
    schedule="wsd",
    warmup_steps=min(epoch, steps // 8),
    decay_share=0.2,  # last fifth of a phase, linear to final_lr
    final_lr=1e-5,
  )


def random_order(config: ml_collections.ConfigDict, steps: int) -> None:
  """Random orders for half of the steps, raster order in the last quarter (RAR)."""
  config.model.update(target_embedding=True, attention_dropout=0.1)
  config.objective.random_order = (steps // 2, 3 * steps // 4)
  config.optimizer.update(
    schedule="cosine", warmup_steps=steps // 4, final_lr=1e-5, b2=0.96,
    weight_decay=0.03,
  )  # fmt: skip


def guidance_free(config: ml_collections.ConfigDict, steps: int) -> None:
  """Guidance is a part of the trained logits (GFT, arXiv 2501.15420)."""
  config.model.guidance_embedding = True
  config.objective.kind = "guidance-free"
  config.optimizer.update(schedule="cosine", final_lr=1e-5)
  # About 1 / guidance scale; another one can be asked for in sampling.
  config.sampling.update(guidance_scale=1.0, guidance_beta=0.66)


RECIPES = {
  "npp": next_patch_prediction,
  "wsd": warmup_stable_decay,
  "rar": random_order,
  "gft": guidance_free,
}
