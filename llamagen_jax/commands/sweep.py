"""`llamagen evaluate --sweep`: scores over a range of one sampling setting.

Every value is a set of samples and a result of its own in the folder, so that a sweep
that was killed goes on, and a longer one takes what is there.
"""

import dataclasses
import decimal
from typing import Any

from etils import epath
from matplotlib import figure

from llamagen_jax.commands import sample, sampling_flags
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import score
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.evaluation.protocols import (
  PROTOCOLS,
  count_problems,
  reference_problems,
)
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option
from llamagen_jax.storage import atomic_write, user_path
from llamagen_jax.weights.published import PUBLISHED

SETTINGS = {
  "guidance": "guidance_scale", "temperature": "temperature", "top-k": "top_k",
  "top-p": "top_p",
}  # fmt: skip
PLOTTED = ("FID", "IS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(sampling_flags.SamplingOverrides):
  """A sweep."""

  sweep: str | None = option(
    "generate and evaluate samples for each value, both ends included, such as"
    f" guidance=1.5:2.25:0.25; NAME is one of {', '.join(SETTINGS)}", None,
    unit="NAME=START:STOP:STEP",
  )  # fmt: skip
  gpt: str | None = option("bundle of the transformer", None, unit="FOLDER")
  tokenizer: str | None = option("bundle of the tokenizer", None, unit="FOLDER")
  count: int | None = option(
    "samples a value; default: the protocol's", None, unit="IMAGES", at_least=1
  )
  seed: int = option("of the samples", 0)
  batch_size: int = option(
    "samples at a time on every device", sample.BATCH_SIZE, unit="IMAGES", at_least=1
  )


def run(args: Any) -> None:
  """Generates samples, evaluates and plots them, one value after the other."""
  setting, values = parse(args.sweep)
  _check(args, setting)
  count = args.count or PROTOCOLS[args.protocol].samples
  if not count:
    raise UserError(f"--protocol={args.protocol} has no number of samples: --count")
  folder, evaluate, results = user_path(args.out), None, {}
  as_stored = args.protocol != "custom"  # published scores do not turn photographs
  reference = open_image_set("--reference", args.reference, as_stored=as_stored)
  protocol = PROTOCOLS[args.protocol]
  found = count_problems(protocol, count) + reference_problems(protocol, reference)
  if found and not args.mismatched:
    raise UserError(f"not {args.protocol}: {'; '.join(found)} (--mismatched generates"
                    " and evaluates anyway)")  # fmt: skip
  for value in values:
    samples = folder / f"{args.sweep.partition('=')[0]}-{value}.npz"
    sample.run(_sample_options(args, setting, value, count, samples))
    evaluate = evaluate or score.Evaluator(args)
    result = evaluate(open_image_set("--sweep", samples), reference)
    if result is None:
      continue
    score.write(result, samples.with_suffix(".scores.json"))
    print(score.table(result))
    results[float(value)] = result
    plot(folder / "sweep.png", args.sweep.partition("=")[0], results)
  if results:
    print(f"{summary(results)}\n{folder}/sweep.png")


def parse(text: str) -> tuple[str, list[decimal.Decimal]]:
  """Returns the field of `SamplingConfig` and the values of NAME=START:STOP:STEP."""
  name, _, span = text.partition("=")
  try:
    start, stop, step = map(decimal.Decimal, span.split(":"))
    if name not in SETTINGS or step <= 0 or not start <= stop:
      raise ValueError
    values = [start + i * step for i in range(int((stop - start) / step) + 1)]
  except (ValueError, decimal.InvalidOperation) as error:
    raise UserError(
      f"--sweep={text}: expected NAME=START:STOP:STEP with NAME one of"
      f" {', '.join(SETTINGS)}, START <= STOP and a positive STEP"
    ) from error
  return SETTINGS[name], values


def _check(args: Any, setting: str) -> None:
  missing = [name for name in ("gpt", "tokenizer", "out") if not getattr(args, name)]
  if missing:
    raise UserError(f"--sweep needs --{missing[0]}")
  if PROTOCOLS[args.protocol].same_order:
    raise UserError(f"--protocol={args.protocol} is not for samples of a transformer")
  if args.samples:
    raise UserError("--sweep makes its own samples: no --samples")
  if getattr(args, setting) is not None:
    raise UserError(f"--sweep={args.sweep} sets {setting}: do not give it twice")
  if not user_path(args.inception).exists():  # before hours of sampling
    raise UserError(f"--inception={args.inception}: no such file or folder")


def _sample_options(args: Any, setting: str, value, count: int, out) -> sample.Options:
  kind = type(getattr(SamplingConfig(), setting))
  return sample.Options(
    gpt=args.gpt, tokenizer=args.tokenizer, out=str(out), fid_batch=count,
    seed=args.seed, batch_size=args.batch_size,
    **(sampling_flags.given(args) | {setting: kind(value)}),
  )  # fmt: skip


def summary(results: dict[float, dict[str, Any]]) -> str:
  """Returns all values in one table."""
  names = list(next(iter(results.values()))["scores"])
  rows = ["".join([f"{'value':>10}", *(f"{name:>12}" for name in names)])]
  for value, result in results.items():
    scores = (f"{result['scores'][name]['ours']:12.5g}" for name in names)
    rows.append("".join([f"{value:10g}", *scores]))
  return "\n".join(rows)


def plot(path: epath.Path, name: str, results: dict[float, dict[str, Any]]) -> None:
  """Plots FID and IS against the setting, beside the published figures."""
  values = list(results)
  models = {result["model"] for result in results.values()}
  model = models.pop() if len(models) == 1 else None
  sheet = figure.Figure(figsize=(9, 3.6), layout="constrained")
  for axes, metric in zip(sheet.subplots(1, 2), PLOTTED, strict=True):
    ours = [result["scores"][metric]["ours"] for result in results.values()]
    axes.plot(values, ours, "o-", label="ours")
    best = (min if metric == "FID" else max)(zip(ours, values, strict=True))
    axes.annotate(
      f"{best[0]:.4g}", best[::-1], xytext=(0, 8), textcoords="offset points",
      ha="center",
    )  # fmt: skip
    known = published(name, model, metric)
    if known:
      label = f"published {model}"
      axes.plot(*zip(*known, strict=True), "s", color="0.4", label=label)
    axes.set(xlabel=name, title=metric)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
  with atomic_write(path) as file:
    sheet.savefig(file, dpi=120, format="png")


def published(name: str, model: str | None, metric: str) -> list[tuple[float, float]]:
  """Returns a model's published (guidance, score), without guidance and at its best."""
  known = PUBLISHED.get(model or "")
  if name != "guidance" or known is None or metric not in known.unguided:
    return []
  return [(1.0, known.unguided[metric]), (known.guidance_scale, known.scores[metric])]
