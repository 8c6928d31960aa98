"""`llamagen train-tokenizer`: trains a VQ tokenizer and its discriminator."""

from collections.abc import Sequence

from llamagen_jax.training.recipe import parse_command
from llamagen_jax.training.train_tokenizer import train


def main(argv: Sequence[str]) -> None:
  command = parse_command("train-tokenizer", argv)
  config = command.config
  if command.init_from:
    with config.unlocked():
      config.init = {**config.get("init", {}), "source": command.init_from}
  train(config, command.workdir, command.profile)
