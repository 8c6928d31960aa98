"""`llamagen train-gpt`: trains a transformer on code shards."""

from collections.abc import Sequence

from llamagen_jax.training.recipe import parse_command
from llamagen_jax.training.train_gpt import train


def main(argv: Sequence[str]) -> None:
  command = parse_command("train-gpt", argv)
  if command.init_from:
    with command.config.unlocked():
      command.config.init_from = command.init_from
  train(command.config, command.workdir, command.profile)
