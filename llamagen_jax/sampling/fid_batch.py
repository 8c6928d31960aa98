"""Tens of thousands of images for an evaluator: resumable, over all hosts.

Every finished batch is a file in a folder next to the output, so that a run that was
killed continues with the missing ones. At the end they become one npz in ADM's format,
with a JSON file of the settings by its side.
"""

from collections.abc import Iterator
import itertools
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
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.images import save_npz, save_png
from llamagen_jax.sampling.sample import SamplingJob, sample_batches
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.storage import atomic_write, read_json, user_path, write_json
from llamagen_jax.weights import bundle

LABELS = ("uniform", "balanced")
PLAN = "plan.json"
PNG_BATCH = 100  # images of a finished npz that are read at a time


def choose_labels(mode: str, count: int, num_classes: int, seed: int) -> np.ndarray:
  """Returns labels int32 [count]: "uniform" at random, or "balanced", in turn."""
  if mode == "balanced":
    return (np.arange(count) % num_classes).astype(np.int32)
  return np.random.default_rng(seed).integers(num_classes, size=count, dtype=np.int32)


def settings_path(out: epath.Path) -> epath.Path:
  """Returns the JSON file next to an npz."""
  return out.with_suffix(".json")


def run(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  out: str | os.PathLike,
  settings: dict[str, Any],
  labels: np.ndarray | None,
  *,
  folder: str | os.PathLike | None = None,
) -> Timings | None:
  """Samples a job into an npz; all hosts call this, and see the same file system.

  Args:
    gpt: on a mesh over all devices.
    tokenizer: the one whose codes it learned, on the same mesh.
    job: the images to sample.
    out: the npz.
    settings: everything that decides the images, written next to the npz; a run
      that continues must have the same ones.
    labels: int32 [N], `arr_1` of the npz, if it is to have one.
    folder: also write every image there, as PNG.

  Returns:
    The seconds of every stage; None if the npz was finished already.

  Raises:
    UserError: images of another run are there, or the hosts see different folders.
  """
  out, folder = user_path(out), None if folder is None else user_path(folder)
  shards = out.with_name(f"{out.name}.shards")
  settings = json.loads(json.dumps(settings))  # as it will be read back
  if out.exists():
    _compare(settings_path(out), settings)
    if jax.process_index() == 0:
      if folder is not None:
        _write_pngs(out, folder)
      if shards.exists():  # a kill came between the npz and their removal
        shards.rmtree()
    return None
  if (shards / PLAN).exists():
    _compare(shards / PLAN, settings)
  if jax.process_index() == 0:
    shards.mkdir(parents=True, exist_ok=True)
    write_json(shards / PLAN, settings)
    if folder is not None:
      folder.mkdir(parents=True, exist_ok=True)
  _check_shared(shards / PLAN)

  batches, timings = _missing(shards, job, folder), Timings()
  done = len(job.conditions) - sum(len(job.indices(batch)) for batch in batches)
  with tqdm.tqdm(
    total=len(job.conditions), initial=done, desc="sample", unit="image",
    dynamic_ncols=True, disable=jax.process_index() != 0,
  ) as bar:  # fmt: skip
    for batch, images in sample_batches(gpt, tokenizer, job, batches, timings):
      if folder is not None:
        for index, image in zip(job.indices(batch), images, strict=True):
          save_png(_png(folder, index), Image.fromarray(image))
      with atomic_write(_shard(shards, batch)) as file:
        np.save(file, images)
      # The other hosts sample at the same pace.
      bar.update(min(len(images) * jax.process_count(), bar.total - bar.n))

  multihost_utils.sync_global_devices("sampled")
  if jax.process_index() == 0:
    write_json(settings_path(out), settings)
    save_npz(out, _read_shards(shards, job), len(job.conditions), labels)
    shards.rmtree()
  multihost_utils.sync_global_devices("assembled")
  return timings


def _check_shared(path: epath.Path) -> None:
  """Refuses, on all hosts, a folder in which some do not see the file of host 0."""
  multihost_utils.sync_global_devices("planned")
  seen = multihost_utils.process_allgather(np.array(path.exists()))
  if not seen.all():
    raise UserError(
      f"--out: host {int(np.argmin(seen))} does not see {path}, which host 0 wrote;"
      " --fid-batch on several hosts needs a folder that all share, or gs://"
    )


def _missing(
  shards: epath.Path, job: SamplingJob, folder: epath.Path | None
) -> list[int]:
  """Returns the batches that are not done. One host decides, so that all agree."""

  def is_done(batch: int) -> bool:
    last_png = None if folder is None else _png(folder, job.indices(batch)[-1])
    return _shard(shards, batch).exists() and (last_png is None or last_png.exists())

  missing = np.zeros(job.batches, np.int32)
  if jax.process_index() == 0:
    missing = np.array([not is_done(b) for b in range(job.batches)], np.int32)
  missing = multihost_utils.broadcast_one_to_all(missing)
  return [int(batch) for batch in np.flatnonzero(missing)]


def _png(folder: epath.Path, index: int) -> epath.Path:
  return folder / f"{index:06d}.png"


def _write_pngs(out: epath.Path, folder: epath.Path) -> None:
  """Writes the images of a finished npz that are not in the folder yet."""
  folder.mkdir(parents=True, exist_ok=True)
  images = open_image_set("--out", out)
  found = itertools.chain.from_iterable(images.batches(PNG_BATCH))
  bar = tqdm.tqdm(
    found, total=images.count, desc="png", unit="image", dynamic_ncols=True
  )
  for index, image in enumerate(bar):
    if not _png(folder, index).exists():
      save_png(_png(folder, index), Image.fromarray(image))


def _shard(shards: epath.Path, batch: int) -> epath.Path:
  return shards / f"batch-{batch:06d}.npy"


def _read_shards(shards: epath.Path, job: SamplingJob) -> Iterator[np.ndarray]:
  for batch in range(job.batches):
    with _shard(shards, batch).open("rb") as file:
      yield np.load(file)


def _compare(path: epath.Path, settings: dict[str, Any]) -> None:
  if not path.exists():
    raise UserError(f"{path.parent}: images without {path.name}: choose another --out")
  there = read_json(path)
  if not isinstance(there, dict):
    raise UserError(f"{path}: expected an object of settings; choose another --out")
  for name in sorted(there.keys() | settings.keys()):
    if there.get(name) != settings.get(name):
      raise UserError(
        f"{path}: images of other settings, {name} is {there.get(name)!r} there,"
        f" {settings.get(name)!r} here; choose another --out"
      )
