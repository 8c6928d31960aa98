"""Tens of thousands of images for an evaluator: resumable, over all hosts.

Every finished batch is a file in a folder next to the output, so that a run that was
killed goes on with what is missing. At the end they become one npz in ADM's format,
with a JSON file of the settings by its side.
"""

from collections.abc import Iterator
import json
import os
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from PIL import Image
import tqdm

from llamagen_jax.errors import UserError
from llamagen_jax.images import save_npz, save_png
from llamagen_jax.sampling.sample import SamplingJob, Timings, draw
from llamagen_jax.weights import bundle

LABELS = ("uniform", "balanced")
PLAN = "plan.json"


def choose_labels(mode: str, count: int, num_classes: int, seed: int) -> np.ndarray:
  """Labels int32 [count]: drawn uniformly, or every class as often as the others."""
  if mode == "balanced":
    return (np.arange(count) % num_classes).astype(np.int32)
  return np.random.default_rng(seed).integers(num_classes, size=count, dtype=np.int32)


def settings_path(out: str | os.PathLike) -> epath.Path:
  """The JSON file next to an npz."""
  return epath.Path(out).with_suffix(".json")


def write_settings(out: str | os.PathLike, settings: dict[str, Any]) -> None:
  _write_json(settings_path(out), settings)


def run(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  out: str | os.PathLike,
  settings: dict[str, Any],
  labels: np.ndarray | None,
  folder: str | os.PathLike | None = None,
) -> Timings | None:
  """Draws a job into an npz; all hosts call this, and see the same file system.

  Args:
    gpt: on a mesh over all devices.
    tokenizer: the one whose codes it draws, on the same mesh.
    job: what to draw.
    out: the npz.
    settings: everything that decides the images, written next to the npz; a run
      that goes on must have the same ones.
    labels: what `arr_1` of the npz holds, if anything.
    folder: also write every image there, as PNG.

  Returns:
    Where the time went; None if the npz was finished already.

  Raises:
    UserError: if another run's images are in the way.
  """
  out = epath.Path(out)
  shards = out.with_name(f"{out.name}.shards")
  settings = json.loads(json.dumps(settings))  # as it will be read back
  if out.exists():
    _compare(settings_path(out), settings)
    return None
  if (shards / PLAN).exists():
    _compare(shards / PLAN, settings)
  if jax.process_index() == 0:
    shards.mkdir(parents=True, exist_ok=True)
    _write_json(shards / PLAN, settings)
    if folder is not None:
      epath.Path(folder).mkdir(parents=True, exist_ok=True)

  batches = _missing(shards, job, folder)
  done = len(job.conditions) - sum(len(job.rows(batch)) for batch in batches)
  seconds = Timings()
  with tqdm.tqdm(
    total=len(job.conditions), initial=done, desc="draw", unit="image",
    dynamic_ncols=True, disable=jax.process_index() != 0,
  ) as bar:  # fmt: skip
    for batch, images in draw(gpt, tokenizer, job, batches, seconds):
      if folder is not None:
        for row, image in zip(job.rows(batch), images, strict=True):
          save_png(_png(folder, row), Image.fromarray(image))
      _write_shard(_shard(shards, batch), images)
      # The other hosts draw at the same pace.
      bar.update(min(len(images) * jax.process_count(), bar.total - bar.n))

  multihost_utils.sync_global_devices("drawn")
  if jax.process_index() == 0:
    write_settings(out, settings)
    parts = _read_shards(shards, job)
    save_npz(out, parts, len(job.conditions), labels)
    shards.rmtree()
  multihost_utils.sync_global_devices("assembled")
  return seconds


def _missing(shards: epath.Path, job: SamplingJob, folder) -> list[int]:
  """The batches that are not done. One host decides, so that all agree."""

  def is_done(batch: int) -> bool:
    last_png = None if folder is None else _png(folder, job.rows(batch)[-1])
    return _shard(shards, batch).exists() and (last_png is None or last_png.exists())

  missing = np.zeros(job.batches, np.int32)
  if jax.process_index() == 0:
    missing = np.array([not is_done(b) for b in range(job.batches)], np.int32)
  # Makes the others wait for the folders, too.
  missing = multihost_utils.broadcast_one_to_all(missing)
  return [int(batch) for batch in np.flatnonzero(missing)]


def _png(folder: str | os.PathLike, row: int) -> epath.Path:
  return epath.Path(folder) / f"{row:06d}.png"


def _shard(shards: epath.Path, batch: int) -> epath.Path:
  return shards / f"batch-{batch:06d}.npy"


def _write_shard(path: epath.Path, images: np.ndarray) -> None:
  part = path.with_name(f".{path.name}.part")
  with part.open("wb") as file:
    np.save(file, images)
  part.replace(path)


def _read_shards(shards: epath.Path, job: SamplingJob) -> Iterator[np.ndarray]:
  for batch in range(job.batches):
    with _shard(shards, batch).open("rb") as file:
      yield np.load(file)


def _compare(path: epath.Path, settings: dict[str, Any]) -> None:
  if not path.exists():
    raise UserError(f"{path.parent}: images without {path.name}: choose another --out")
  found = json.loads(path.read_text())
  for name in sorted(found.keys() | settings.keys()):
    if found.get(name) != settings.get(name):
      raise UserError(
        f"{path}: images of other settings, {name} is {found.get(name)!r} there,"
        f" {settings.get(name)!r} here; choose another --out"
      )


def _write_json(path: epath.Path, value: Any) -> None:
  part = path.with_name(f".{path.name}.part")
  part.write_text(json.dumps(value, indent=1))
  part.replace(path)
