"""Trains a VQ tokenizer and its discriminator.

A run that was stopped goes on from its newest checkpoint with the same command.

llamagen train-tokenizer --config=configs/vq_imagenet.py:VQ-16 \\
    --config.data.source=folder:/data/imagenet/train \\
    --config.data.eval_source=folder:/data/imagenet/val --workdir=gs://bucket/vq16
llamagen train-tokenizer --config=configs/vq_folder.py:/data/images --workdir=vq
"""

from collections.abc import Sequence

from llamagen_jax.commands import config_flag
from llamagen_jax.commands.train_gpt import Options
from llamagen_jax.parallel.hosts import initialize_distributed
from llamagen_jax.storage import user_path
from llamagen_jax.training.tokenizer_step import TokenizerRecipe
from llamagen_jax.training.train_tokenizer import train


def main(argv: Sequence[str]) -> None:
  options, config = config_flag.parse(
    Options, TokenizerRecipe, "train-tokenizer", argv, __doc__
  )
  initialize_distributed(options)
  if options.init_from:
    config.init.source = options.init_from
  train(config, user_path(options.workdir), options.profile)
