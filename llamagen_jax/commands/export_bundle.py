"""`llamagen export-bundle`: a bundle of a run's checkpoint, while the run may go on."""

import argparse
from collections.abc import Sequence

from llamagen_jax.storage import user_path
from llamagen_jax.training.export import export_bundle


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser("llamagen export-bundle", description=__doc__)
  add = parser.add_argument
  add("--workdir", required=True, help="of a run of train-gpt or train-tokenizer")
  add("--step", type=int, help="of the checkpoint; the newest if not given")
  add("--out", help="folder of the bundle; WORKDIR/bundle if not given")
  args = parser.parse_args(argv)
  out = user_path(args.out) if args.out else None
  path, step = export_bundle(user_path(args.workdir), out, args.step)
  print(f"{path}: the weights of step {step}")
