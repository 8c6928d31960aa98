"""Writes a bundle of a run's checkpoint, while the run may go on.

llamagen export-bundle --workdir=gs://bucket/L384 --out=L384
"""

from collections.abc import Sequence
import dataclasses

from llamagen_jax.commands import arguments
from llamagen_jax.options import option
from llamagen_jax.storage import user_path
from llamagen_jax.training.export import export_bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of export-bundle."""

  workdir: str = option("of a run of train-gpt or train-tokenizer", unit="FOLDER")
  step: int | None = option("of the checkpoint; default: the newest", None)
  out: str | None = option(
    "the bundle; default: bundle in the workdir", None, unit="FOLDER"
  )


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "export-bundle", argv, __doc__)
  out = user_path(args.out) if args.out else None
  path, step = export_bundle(user_path(args.workdir), out, args.step)
  print(f"{path}: the weights of step {step}")
