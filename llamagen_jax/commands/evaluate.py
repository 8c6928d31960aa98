"""`llamagen evaluate`: two sets of images in, a table of scores out.

With --sweep it draws the samples itself, for every value of a sampling setting.
"""

import argparse
from collections.abc import Sequence

import jax

from llamagen_jax.commands import sweep
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import score
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.evaluation.protocols import PROTOCOLS
from llamagen_jax.images import save_npz
from llamagen_jax.parallel import hosts


def main(argv: Sequence[str]) -> None:
  args = _parse(argv)
  hosts.initialize_distributed(args)
  if args.sweep:
    sweep.run(args)
    return
  if not args.samples:
    raise UserError("expected --samples or --sweep")
  samples = open_image_set("--samples", args.samples)
  protocol = PROTOCOLS[args.protocol]
  crop = protocol.side if protocol.crop_reference else None
  reference = open_image_set("--reference", args.reference, crop)
  evaluate = score.Evaluator(args)
  evaluate.check(samples, reference)
  if args.export_adm and jax.process_index() == 0:
    batches = samples.batches(args.inception_batch)
    save_npz(args.export_adm, batches, samples.count, samples.labels)
  result = evaluate(samples, reference)
  if result is not None:
    out = args.out or f"{str(samples.path).rstrip('/')}.scores.json"
    score.write(result, out)
    print(f"{score.table(result)}\nwritten to {out}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser("llamagen evaluate", description=__doc__)
  add = parser.add_argument
  add("--samples", help="npz (arr_0 uint8 [N,H,W,3]) or folder")
  add("--reference", required=True, help="the same, or an npz with mu and sigma")
  add(
    "--out", help="JSON of the result; default: next to the samples; folder of a sweep"
  )
  add("--export-adm", help="also write the samples as npz for OpenAI's evaluator")
  score.add_flags(parser, required=True)
  sweep.add_flags(parser)
  hosts.add_flags(parser)
  return parser.parse_args(argv)
