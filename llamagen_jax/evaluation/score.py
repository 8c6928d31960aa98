"""Two sets of images and a protocol -> a result: scores and all they depend on."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import statistics
from llamagen_jax.evaluation.cached_features import CACHE, CachedImageMap, Extractor
from llamagen_jax.evaluation.clip_score import ClipScorer, read_prompts
from llamagen_jax.evaluation.image_sets import ImageSet
from llamagen_jax.evaluation.protocols import (
  PROTOCOLS,
  Protocol,
  differences,
  problems,
  published_model,
  published_scores,
)
from llamagen_jax.options import option
from llamagen_jax.parallel.mesh import make_data_mesh
from llamagen_jax.storage import user_path, write_json
from llamagen_jax.vision.inception import FEATURES
from llamagen_jax.weights.inception import load_inception

SPLIT = 5000  # images a split of the Inception Score
MAX_REFERENCE = 10_000  # reference images of precision and recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
  """Evaluation."""

  protocol: str | None = option(
    "; ".join(f"{name}: {p.about}" for name, p in PROTOCOLS.items()), None,
    choices=tuple(PROTOCOLS),
  )  # fmt: skip
  inception: str | None = option(
    "its bundle (import-weights), or pt_inception-2015-12-05-6726825d.pth", None,
    unit="PATH",
  )  # fmt: skip
  model: str | None = option(
    "compare with this published checkpoint (import-weights --list); default: the one"
    " that the samples' settings fit", None, unit="NAME",
  )  # fmt: skip
  mismatched: bool = option("evaluate what the protocol refuses", False)
  inception_batch: int = option(
    "images at a time on every device", 32, unit="IMAGES", at_least=1
  )
  clip: str | None = option(
    "CLIP of transformers or open_clip, for the CLIP score", None, unit="FOLDER"
  )
  prompt_file: str | None = option(
    "text file, a line for every image (default: captions.txt in the samples' folder)",
    None, unit="FILE",
  )  # fmt: skip
  cache: str = option("features that were computed before", CACHE, unit="FOLDER")


class Evaluator:
  """Evaluates pairs of sources as the options say."""

  def __init__(self, args: EvaluationOptions):
    if args.model:
      published_scores(args.protocol, args.model)
    self.name, self._model = args.protocol, args.model
    self._mismatched = args.mismatched
    params = load_inception(args.inception)
    values = CachedImageMap(make_data_mesh(), args.inception_batch, args.cache)
    self._extract = Extractor(params, values)
    needed = "CLIP score" in PROTOCOLS[self.name].metrics and not self._mismatched
    if needed and not args.clip:
      raise UserError(f"--protocol={self.name} needs --clip, the folder of a CLIP")
    self._clip = ClipScorer(args.clip, values) if args.clip else None
    self._prompts = args.prompt_file

  def check(self, samples: ImageSet, reference: ImageSet) -> list[str]:
    """Returns the pair's problems, where --mismatched allows them."""
    if not samples.count:
      raise UserError(f"{samples.path}: holds no images to evaluate")
    found = problems(PROTOCOLS[self.name], samples, reference)
    if found and not self._mismatched:
      raise UserError(
        f"not {self.name}: {'; '.join(found)} (--mismatched evaluates anyway, and the"
        " result says so)"
      )
    return found

  def __call__(self, samples: ImageSet, reference: ImageSet) -> dict[str, Any] | None:
    """Returns the result as JSON will hold it, on host 0. All hosts call this."""
    found, protocol = self.check(samples, reference), PROTOCOLS[self.name]
    prompts = read_prompts(self._prompts, samples) if self._clip else []
    scores = _scores(protocol, self._extract, samples, reference)
    if self._clip:
      cosine_N = self._clip(samples, prompts, protocol.prefix)
      scores["CLIP score"] = float(np.mean(cosine_N)) if len(cosine_N) else 0.0
    multihost_utils.sync_global_devices("scores")
    if jax.process_index() != 0:
      return None
    model = self._model or published_model(self.name, samples.settings)
    return {
      "protocol": self.name,
      "mismatches": found,
      "cautions": cautions(scores, samples, reference),
      "samples": _described(samples),
      "reference": _described(reference),
      "inception": self._extract.identity,
      "clip": self._clip and self._clip.identity,
      "settings": samples.settings,
      "model": model,
      "differences": differences(samples.settings, model),
      "scores": _compared(scores, published_scores(self.name, model)),
    }


def cautions(
  scores: Mapping[str, float], samples: ImageSet, reference: ImageSet
) -> list[str]:
  """Returns reasons to doubt the scores of sets as small as these."""
  counts = {"samples": samples.count}
  if "mu" not in reference.statistics:
    counts["reference images"] = reference.count
  return [
    f"{count} {name}: with fewer than {FEATURES}, FID is too small to be compared"
    for name, count in counts.items()
    if "FID" in scores and count < FEATURES
  ]


def _described(source: ImageSet) -> dict[str, Any]:
  return {
    "path": str(source.path), "sha256": source.sha256, "count": source.count,
  }  # fmt: skip


def _scores(
  protocol: Protocol, extract: Extractor, samples: ImageSet, reference: ImageSet
) -> dict[str, float]:
  """Returns the scores by name, on host 0."""
  ours = extract(samples, "samples")
  theirs = extract(reference, "reference") if reference.count else {}
  if jax.process_index() != 0:
    return {}
  for source, features in ((samples, ours), (reference, theirs)):
    if features and len(features["pool"]) > 1 and _constant(features["pool"]):
      raise UserError(
        f"{source.path}: all {source.count} images have the same features: they are"
        " one image over and over, and no distribution to compare"
      )

  def distance(kind: str, names: tuple[str, str]) -> float | None:
    if names[0] in reference.statistics and names[1] in reference.statistics:
      gaussian = tuple(reference.statistics[name] for name in names)
    elif theirs:
      gaussian = statistics.Moments.of(theirs[kind]).gaussian
    else:
      return None
    own = statistics.Moments.of(ours[kind]).gaussian
    return statistics.gaussian_distance(own, gaussian)

  scores: dict[str, float | None] = {}
  if "FID" in protocol.metrics:
    scores[protocol.fid_name] = distance("pool", ("mu", "sigma"))
  if "sFID" in protocol.metrics:
    scores["sFID"] = distance("spatial", ("mu_s", "sigma_s"))
  if "IS" in protocol.metrics:
    logits = extract.logits(ours["pool"])
    scores["IS"] = statistics.inception_score(logits, SPLIT)
  if "precision" in protocol.metrics and theirs:
    manifold = theirs["pool"][:MAX_REFERENCE]
    precision, recall = statistics.precision_recall(manifold, ours["pool"])
    scores |= {"precision": precision, "recall": recall}
  return {name: value for name, value in scores.items() if value is not None}


def _constant(features_NC: np.ndarray) -> bool:
  return bool((features_NC == features_NC[0]).all())


def _compared(scores: Mapping[str, float], known: Mapping[str, float]):
  rows = {}
  for name, value in scores.items():
    rows[name] = {"ours": value, "published": known.get(name)}
    if name in known:
      rows[name]["difference"] = value - known[name]
  return rows


def write(result: dict[str, Any], out: str | os.PathLike) -> None:
  """Writes the JSON, under its name only when it is complete."""
  write_json(user_path(out), result)


def table(result: dict[str, Any]) -> str:
  """Returns a result as text."""
  lines = [f"{'protocol':12}{result['protocol']}"]
  for name in ("samples", "reference"):
    entry = result[name]
    lines.append(f"{name:12}{entry['count']} images, sha256 {entry['sha256']}")
  for text in result["mismatches"]:
    lines.append(f"{'MISMATCH':12}{text}")
  for text in result["cautions"]:
    lines.append(f"{'CAUTION':12}{text}")
  for text in result["differences"]:
    lines.append(f"{'DIFFERS':12}{text}")
  sampling = (result["settings"] or {}).get("sampling")
  if sampling:
    text = ", ".join(f"{name} {value}" for name, value in sampling.items())
    lines.append(f"{'settings':12}{text}")
  lines.append(f"{'model':12}{result['model'] or 'not a published one'}")
  lines.append(f"{'':12}{'ours':>10}{'published':>11}{'difference':>12}")
  for name, row in result["scores"].items():
    line = f"{name:12}{row['ours']:10.5g}"
    if row["published"] is not None:
      line += f"{row['published']:11.5g}{row['difference']:+12.4g}"
    lines.append(line)
  return "\n".join(lines)
