"""Trains a transformer on code shards.

A run that was stopped goes on from its newest checkpoint with the same command.

llamagen train-gpt --config=configs/c2i_imagenet.py:L,image_size=384 \\
    --config.data.codes=/data/codes --config.data.eval_codes=/data/codes_val \\
    --config.optimizer.lr=3e-4 --workdir=gs://bucket/L384
llamagen train-gpt --config=configs/c2i_folder.py:codes --workdir=gpt
"""

from collections.abc import Sequence
import dataclasses

from llamagen_jax.commands import config_flag
from llamagen_jax.commands.config_flag import ConfigOptions
from llamagen_jax.options import option
from llamagen_jax.parallel.hosts import HostOptions, initialize_distributed
from llamagen_jax.storage import user_path
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.train_gpt import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(HostOptions, ConfigOptions):
  """Options of both trainers."""

  workdir: str = option("checkpoints, logs and the bundle", unit="FOLDER")
  init_from: str = option(
    "run or bundle whose weights a fresh run starts from, at step 0", "", unit="FOLDER"
  )
  profile: int = option(
    "steps to trace for XProf, into the folder profile of the workdir", 0,
    unit="STEPS", at_least=0,
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  options, config = config_flag.parse(Options, GPTRecipe, "train-gpt", argv, __doc__)
  initialize_distributed(options)
  if options.init_from:
    config.init_from = options.init_from
  train(config, user_path(options.workdir), options.profile)
