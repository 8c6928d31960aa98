"""`python -m llamagen_jax VERB`: the command, where none is installed."""

from llamagen_jax.commands.cli import main

if __name__ == "__main__":
  main()
