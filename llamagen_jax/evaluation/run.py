"""`llamagen evaluate`: two sets of pictures in, a table of scores out."""

import argparse
from collections.abc import Sequence
import json
import os
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from llamagen_jax import bundle, pictures
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import statistics
from llamagen_jax.evaluation.inception import extract_features
from llamagen_jax.evaluation.protocols import PROTOCOLS, problems, published_model
from llamagen_jax.evaluation.sources import Source, open_source
from llamagen_jax.interop.inception import load_inception
from llamagen_jax.interop.published import PUBLISHED
from llamagen_jax.training.mesh import batch_sharding, make_mesh, replicated

SPLIT = 5000  # pictures a split of the Inception Score
MANIFOLD = 10_000  # reference pictures of precision and recall
CACHE = "~/.cache/llamagen_jax/features"


def main(argv: Sequence[str]) -> None:
  args = _parse(argv)
  protocol = PROTOCOLS[args.protocol]
  samples = open_source("--samples", args.samples)
  reference = open_source("--reference", args.reference)
  if not samples.count:
    raise UserError(f"--samples={args.samples}: holds no pictures")
  found = problems(protocol, samples, reference)
  if found and not args.mismatched:
    raise UserError(
      f"not {args.protocol}: {'; '.join(found)} (--mismatched evaluates anyway, and"
      " the result says so)"
    )
  if args.export_adm:
    batches = samples.batches(args.batch_size)
    pictures.save_npz(args.export_adm, batches, samples.count, samples.labels)

  extract = Extractor(args.inception, args.batch_size, args.cache)
  scores = _scores(protocol, extract, samples, reference)
  settings = samples.settings
  model = args.model or published_model(settings)
  result = {
    "protocol": args.protocol,
    "mismatches": found,
    "samples": {"path": str(samples.path), "sha256": samples.sha256,
                "count": samples.count},
    "reference": {"path": str(reference.path), "sha256": reference.sha256,
                  "count": reference.count},
    "inception": extract.identity,
    "settings": settings,
    "model": model,
    "scores": _compared(scores, model),
  }  # fmt: skip
  if jax.process_index() == 0:
    print(table(result))
    out = epath.Path(args.out or f"{str(samples.path).rstrip('/')}.scores.json")
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(out)
    print(f"written to {out}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser("llamagen evaluate", description=__doc__)
  add = parser.add_argument
  add("--samples", required=True, help="npz (arr_0 uint8 [N,H,W,3]) or folder")
  add("--reference", required=True, help="the same, or an npz with mu and sigma")
  about = "; ".join(f"{name}: {p.about}" for name, p in PROTOCOLS.items())
  add("--protocol", required=True, choices=PROTOCOLS, help=about)
  add("--inception", required=True, help="pt_inception-2015-12-05-6726825d.pth")
  add("--model", choices=PUBLISHED, help="compare with this checkpoint's scores;"
      " default: the one that the samples' settings fit")  # fmt: skip
  add("--mismatched", action="store_true", help="evaluate what the protocol refuses")
  add("--out", help="JSON of the result; default: next to the samples")
  add("--export-adm", help="also write the samples as npz for OpenAI's evaluator")
  add("--batch-size", type=int, default=64, help="over all devices")
  add("--cache", default=CACHE, help=f"folder of features (default {CACHE})")
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    raise UserError(f"--batch-size={args.batch_size}: expected 1 or more")
  return args


class Extractor:
  """Inception's features of a source, over all devices, kept by content."""

  def __init__(self, weights: str, batch_size: int, cache: str):
    params = load_inception(weights)
    self.identity = bundle.fingerprint(jax.tree.map(jax.numpy.asarray, params))
    self._head = params["head"]
    self._mesh = make_mesh()
    self._params = jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, replicated(self._mesh), lambda index, x=x: x[index]
      ),
      params,
    )
    devices = jax.device_count()
    self._batch_size = -(-batch_size // devices) * devices
    self._cache = epath.Path(os.path.expanduser(cache))

  def __call__(self, source: Source, what: str) -> dict[str, np.ndarray]:
    """pool [N, 2048] and spatial [N, 2023], on every host."""
    file = self._cache / f"{source.sha256[:32]}-{self.identity[:16]}.npz"
    there = np.array(file.exists())
    if multihost_utils.broadcast_one_to_all(there):
      with np.load(file.open("rb")) as found:
        return dict(found)
    pool, spatial = [], []
    with tqdm.tqdm(
      total=source.count, desc=what, unit="picture", dynamic_ncols=True,
      disable=jax.process_index() != 0,
    ) as bar:  # fmt: skip
      for images in source.batches(self._batch_size):
        found = extract_features(self._params, self._place(images))
        pool.append(_gathered(found.pool)[: len(images)])
        spatial.append(_gathered(found.spatial)[: len(images)])
        bar.update(len(images))
    features = {"pool": np.concatenate(pool), "spatial": np.concatenate(spatial)}
    if jax.process_index() == 0:
      self._cache.mkdir(parents=True, exist_ok=True)
      part = file.with_name(f".{file.name}.part")
      with part.open("wb") as stream:
        np.savez(stream, **features)
      part.replace(file)
    multihost_utils.sync_global_devices("features")
    return features

  def logits(self, pool_NC: np.ndarray) -> np.ndarray:
    """Logits without the bias, from pooled features."""
    return pool_NC.astype(np.float64) @ self._head.astype(np.float64)

  def _place(self, images: np.ndarray) -> jax.Array:
    width = [(0, self._batch_size - len(images))] + [(0, 0)] * 3
    images = np.pad(images, width)
    return jax.make_array_from_callback(
      images.shape, batch_sharding(self._mesh), lambda index: images[index]
    )


def _gathered(x: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _scores(protocol, extract: Extractor, samples: Source, reference: Source):
  ours = extract(samples, "samples")
  theirs = extract(reference, "reference") if reference.count else None

  def distance(kind: str, names: tuple[str, str]) -> float | None:
    if names[0] in reference.statistics and names[1] in reference.statistics:
      gaussian = tuple(reference.statistics[name] for name in names)
    elif theirs is not None:
      gaussian = statistics.Moments.of(theirs[kind]).gaussian
    else:
      return None
    own = statistics.Moments.of(ours[kind]).gaussian
    return statistics.gaussian_distance(own, gaussian)

  scores: dict[str, Any] = {}
  if "FID" in protocol.metrics:
    scores[protocol.fid_name] = distance("pool", ("mu", "sigma"))
  if "sFID" in protocol.metrics:
    scores["sFID"] = distance("spatial", ("mu_s", "sigma_s"))
  if "IS" in protocol.metrics:
    logits = extract.logits(ours["pool"])
    scores["IS"] = statistics.inception_score(logits, SPLIT)
  if "precision" in protocol.metrics and theirs is not None:
    manifold = theirs["pool"][:MANIFOLD]
    precision, recall = statistics.precision_recall(manifold, ours["pool"])
    scores |= {"precision": precision, "recall": recall}
  return {name: value for name, value in scores.items() if value is not None}


def _compared(scores: dict[str, float], model: str | None):
  known = PUBLISHED[model].scores if model else {}
  rows = {}
  for name, value in scores.items():
    rows[name] = {"ours": value, "published": known.get(name)}
    if name in known:
      rows[name]["difference"] = value - known[name]
  return rows


def table(result: dict[str, Any]) -> str:
  """A result as text."""
  lines = [f"{'protocol':12}{result['protocol']}"]
  for name in ("samples", "reference"):
    entry = result[name]
    lines.append(f"{name:12}{entry['count']} pictures, sha256 {entry['sha256']}")
  for text in result["mismatches"]:
    lines.append(f"{'MISMATCH':12}{text}")
  sampling = (result["settings"] or {}).get("sampling")
  if sampling:
    text = ", ".join(f"{name} {value}" for name, value in sampling.items())
    lines.append(f"{'settings':12}{text}")
  lines.append(f"{'model':12}{result['model'] or 'not a published one'}")
  lines.append(f"{'':12}{'ours':>10}{'published':>11}{'difference':>12}")
  for name, row in result["scores"].items():
    line = f"{name:12}{row['ours']:10.4f}"
    if row["published"] is not None:
      line += f"{row['published']:11.4f}{row['difference']:+12.4f}"
    lines.append(line)
  return "\n".join(lines)
