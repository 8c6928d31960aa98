"""Compares a set of images with a reference: FID, IS, precision, recall, CLIP score.

With --sweep it generates the samples itself, for each value of a sampling setting.
With --quick it checks in minutes whether weights do what is published of them.

llamagen evaluate --protocol=gfid-adm-imagenet256 --samples=x.npz \\
    --reference=VIRTUAL_imagenet256_labeled.npz --inception=inception
llamagen evaluate --protocol=gfid-adm-imagenet256 --sweep=guidance=1.5:2.25:0.25 \\
    --gpt=c2i_L_384 --tokenizer=vq16 --reference=VIRTUAL_imagenet256_labeled.npz \\
    --inception=inception --out=sweep
llamagen evaluate --quick --gpt=c2i_L_256 --tokenizer=vq16 --inception=inception \\
    --reference=VIRTUAL_imagenet256_labeled.npz --source=folder:imagenet/val --out=quick
"""

from collections.abc import Sequence
import dataclasses

import jax

from llamagen_jax.commands import arguments, quick, sampling_flags, sweep
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import score
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.evaluation.protocols import PROTOCOLS
from llamagen_jax.images import save_npz
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(
  hosts.HostOptions, quick.QuickOptions, sweep.SweepOptions, score.EvaluationOptions
):
  """Options of evaluate."""

  samples: str | None = option(
    "npz (arr_0 uint8 [N, H, W, 3]) or folder of images", None, unit="PATH"
  )
  reference: str | None = option(
    "the same, or an npz with mu and sigma", None, unit="PATH"
  )
  out: str | None = option(
    "JSON of the result, or folder of a sweep; default: beside the samples", None,
    unit="PATH",
  )  # fmt: skip
  export_adm: str | None = option(
    "write the samples as an npz for OpenAI's evaluator, too", None, unit="FILE"
  )


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "evaluate", argv, __doc__)
  if args.quick:
    hosts.initialize_distributed(args)
    quick.run(args)
    return
  for name in ("protocol", "inception", "reference"):
    if not getattr(args, name):
      raise UserError(f"--{name} is required")
  hosts.initialize_distributed(args)
  if args.sweep:
    sweep.run(args)
    return
  if given := sampling_flags.given(args):
    flag = next(iter(given)).replace("_", "-")
    raise UserError(f"--{flag} goes with --sweep or --quick")
  if not args.samples:
    raise UserError("expected --samples or --sweep")
  as_stored = args.protocol != "custom"  # published scores do not turn photographs
  samples = open_image_set("--samples", args.samples, as_stored=as_stored)
  protocol = PROTOCOLS[args.protocol]
  crop = protocol.side if protocol.crop_reference else None
  reference = open_image_set("--reference", args.reference, crop, as_stored=as_stored)
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
