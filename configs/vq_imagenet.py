"""VQ tokenizer on ImageNet images of 256x256: VQ-16 or VQ-8, and their finetuning.

llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16 \\
    --config.data.source=tfds:imagenet2012/train \\
    --config.data.eval_source=tfds:imagenet2012/validation \\
    --config.loss.lpips=vgg.pth,vgg16-397923af.pth --workdir=gs://bucket/vq16

Finetuning on images for text to image, from the run above (both networks and
their optimisers, the discriminator acting from the first step on):

llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16,finetune \\
    --config.data.source=jsonl:/data/images.jsonl \\
    --config.data.eval_source=jsonl:/data/held_out.jsonl \\
    --config.loss.lpips=vgg.pth,vgg16-397923af.pth \\
    --init-from=gs://bucket/vq16 --workdir=gs://bucket/vq16_t2i

Two recipes of successors, each with the same network and data:

llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16,recipe=vqgan-plus \\
    --config.loss.resnet=resnet50-0676ba61.pth --workdir=gs://bucket/vq16_plus
llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16,recipe=ibq \\
    --config.loss.lpips=vgg.pth,vgg16-397923af.pth --workdir=gs://bucket/ibq16

`vqgan-plus` (arXiv 2409.16211) compares logits of ResNet50 in place of LPIPS, and has a
discriminator with blur pooling, LeCAM and a cosine; `ibq` (arXiv 2412.02692) sends
gradients to all rows of the codebook. Their papers report rFID 1.67 (12 bits: 1.39) and
1.37; here neither was trained on ImageNet.

Published after 40 epochs, on the 50 000 validation images: VQ-16 rFID 2.19, PSNR
20.79, ssim_lg .675, usage 97 %; VQ-8 rFID 0.59, PSNR 24.45, ssim_lg .813. `:runlocal`
shrinks model, images and run to a laptop, and trains without LPIPS.
"""

import dataclasses

import ml_collections

from llamagen_jax.errors import UserError
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training.recipe import parse_arg

IMAGENET_IMAGES = 1_281_167


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`VQ-16` or `VQ-8`, `image_size=`, `epochs=`, `finetune`, `recipe=`, `runlocal`."""
  arg = parse_arg(
    arg, variant="VQ-16", image_size=256, epochs=40, finetune=False, recipe="published",
    runlocal=False,
  )  # fmt: skip
  if arg.recipe not in RECIPES:
    raise UserError(f"recipe={arg.recipe!r}: expected {', '.join(RECIPES)}")
  local = arg.runlocal
  small = {"width": 32, "res_blocks": 1, "latent_width": 32, "codebook_size": 512}
  large = {"dtype": "bfloat16", "remat": True}  # activations of 256x256 are large
  batch_size = 4 if local else 128
  config = ml_collections.ConfigDict()

  # Shape of the generator; every field of TokenizerConfig can be overridden.
  model = TokenizerConfig.preset(arg.variant, **(small if local else large))
  config.model = dataclasses.asdict(model)

  # Weights of the loss terms; those of the quantizer are in `model`.
  disc_start = 5 if local else 20_000
  config.loss = {
    "reconstruction": "l2",  # or l1
    "reconstruction_weight": 1.0,
    "perceptual_weight": 0.0 if local else 1.0,
    "lpips": "",  # LPIPS's and VGG16's files with a comma, or one that holds both
    "adversarial_weight": 0.5,
    "generator": "hinge",  # or non-saturating
    "discriminator": "hinge",  # or vanilla, non-saturating
    "adaptive_weight": False,  # VQGAN's; the published runs have weight 1
    "disc_start": 0 if arg.finetune else disc_start,
    "disc_warmup_steps": 0,  # steps before that in which the discriminator learns alone
  }
  config.discriminator = {
    "kind": "patchgan",  # or stylegan
    "width": 64,
    "layers": 3,
    "dtype": "float32" if local else "bfloat16",
  }

  # Off as published: rows start as noise and are never replaced.
  config.codebook = {"init": "uniform", "restart_every": 0}

  # What --init-from restores: of a run both networks and their optimisers, of a
  # bundle the generator alone.
  config.init = {"source": "", "discriminator": True, "optimizers": True}

  config.data = {
    "source": "folder:/data/imagenet/train",  # or tfds:, jsonl:, arrayrecord:
    "eval_source": "folder:/data/imagenet/val",
    "image_size": 64 if local else arg.image_size,
    "batch_size": batch_size,  # over all hosts
    "accumulate": 1,  # parts of a batch, one after the other, to save memory
    "max_resize": 1.25,  # random crops from shorter sides of 256 .. 320
    "random_flip": True,
    "min_side": 16,  # smaller images are bad ones
    "ignore_exif": True,  # the published tokenizers saw ImageNet's images as stored
    "max_bad_share": 0.001,  # bad images that are replaced before the run fails
    "workers": 0 if local else 16,  # decoding processes on every host
  }

  optimizer = {
    "lr": 1e-4,  # for batch 128; constant in the published recipe
    "schedule": "constant",
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.0,
    "clip": 1.0,
  }
  # The generator's; the bundle holds the average of its weights.
  config.optimizer = {**optimizer, "ema": 0.0 if local else 0.9999}
  config.discriminator_optimizer = optimizer

  config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}
  config.run = {
    "steps": 20 if local else arg.epochs * IMAGENET_IMAGES // batch_size,
    "seed": 0,
    "log_every": 1 if local else 50,
    "eval_every": 10 if local else 10_000,
    "save_every": 10 if local else 5_000,
    "keep_last": 2,
    "keep_every": 0 if local else 100_000,
  }
  if RECIPES[arg.recipe] is not None:
    RECIPES[arg.recipe](config, local)
  return config


def vqgan_plus(config: ml_collections.ConfigDict, local: bool) -> None:
  """VQGAN+, sections 3.1 and 4.1: what each term weighs, and how it is trained."""
  config.loss.update(
    reconstruction_weight=4.0,
    perceptual="resnet50",
    perceptual_weight=0.0 if local else 0.1,
    resnet="",  # file of torchvision's ResNet50, first version of the weights
    adversarial_weight=0.02,
    lecam_weight=0.001,
  )
  config.discriminator.update(kind="blurpool", width=64 if local else 128)
  config.discriminator.layers = 2 if local else 4  # 256x256 -> 16x16 logits
  schedule = {"schedule": "cosine", "warmup_steps": 2 if local else 5000}
  for optimizer in (config.optimizer, config.discriminator_optimizer):
    optimizer.update(b2=0.999, weight_decay=1e-4, **schedule)
  if local:
    config.discriminator_optimizer.warmup_steps = 0
  else:
    config.optimizer.ema = 0.999


def ibq(config: ml_collections.ConfigDict, local: bool) -> None:
  """IBQ, section 4.1: its quantizer, its terms, and a guard against steps of NaN."""
  config.model.update(
    quantizer="ibq", l2_norm=False, entropy_ratio=0.05,
    codebook_dim=32 if local else 256,
  )  # fmt: skip
  config.loss.update(
    generator="non-saturating", adversarial_weight=0.1, lecam_weight=0.05
  )
  # The paper drops the rate twice in the last quarter; here it falls in a line.
  for optimizer in (config.optimizer, config.discriminator_optimizer):
    optimizer.update(schedule="wsd", decay_share=0.25)
  # Two users report runs that ended in NaN.
  config.guard = {"skip_nonfinite": True}


RECIPES = {"published": None, "vqgan-plus": vqgan_plus, "ibq": ibq}
