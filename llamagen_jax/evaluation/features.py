"""Inception's features of many pictures: over all devices and hosts, kept on disk.

Features are kept in pieces, in a folder that is named by the content of the pictures
and of the weights. A rerun reads them in seconds, and one that was killed goes on with
the pieces that are missing.
"""

from collections.abc import Iterable, Iterator
import concurrent.futures
import hashlib
import os
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
import tqdm

from llamagen_jax import bundle
from llamagen_jax.data.loader import to_global
from llamagen_jax.evaluation.inception import extract_features
from llamagen_jax.evaluation.sources import Source
from llamagen_jax.training.mesh import replicated

CACHE = "~/.cache/llamagen_jax/features"
PIECE = 4096  # pictures whose features are one file
KINDS = ("pool", "spatial")


class Extractor:
  """Pictures -> features, on a mesh over all devices."""

  def __init__(
    self, params: Any, mesh: Mesh, batch_size: int, cache: str | os.PathLike
  ):
    """Takes Inception's parameters, whole on every host.

    Args:
      params: as `interop.inception.load_inception` reads them.
      mesh: over the devices of all hosts.
      batch_size: pictures at a time on every device.
      cache: folder of features, which host 0 reads and writes.
    """
    self._mesh = mesh
    self._params = jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, replicated(self._mesh), lambda index: x[index]
      ),
      params,
    )
    self.identity = bundle.fingerprint(self._params)
    self._head = np.asarray(params["head"], np.float64)
    self._batch_size = batch_size * mesh.size
    self._cache = epath.Path(os.path.expanduser(cache))

  def __call__(self, source: Source, what: str) -> dict[str, np.ndarray]:
    """float32 pool [N, 2048] and spatial [N, 2023] on host 0, and nothing elsewhere.

    All hosts call this together; each reads its share of the pictures.

    Args:
      source: the pictures.
      what: they are, for the progress bar.
    """
    names = f"{source.sha256} {self.identity}"
    folder = self._cache / hashlib.sha256(names.encode()).hexdigest()[:40]
    pieces = [
      range(start, min(start + PIECE, source.count))
      for start in range(0, source.count, PIECE)
    ]
    missing = [not _file(folder, piece).exists() for piece in pieces]
    # One host decides, so that all agree.
    missing = multihost_utils.broadcast_one_to_all(np.array(missing))
    todo = [piece for piece, absent in zip(pieces, missing, strict=True) if absent]
    if todo:
      self._extract(source, what, folder, todo)
    if jax.process_index() != 0:
      return {}
    found = [_load(_file(folder, piece)) for piece in pieces]
    return {kind: np.concatenate([piece[kind] for piece in found]) for kind in KINDS}

  def logits(self, pool_NC: np.ndarray) -> np.ndarray:
    """Logits without the bias [N, 1008], from pooled features."""
    return pool_NC.astype(np.float64) @ self._head

  def _extract(
    self, source: Source, what: str, folder: epath.Path, pieces: list[range]
  ) -> None:
    done = source.count - sum(map(len, pieces))
    batches = [batch for piece in pieces for batch in self._batches(piece)]
    here = source.read(_share(batch, self._batch_size) for batch in batches)
    images = _ahead(here)
    with tqdm.tqdm(
      total=source.count, initial=done, desc=what, unit="picture", dynamic_ncols=True,
      disable=jax.process_index() != 0,
    ) as bar:  # fmt: skip
      for piece in pieces:
        rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        for batch in self._batches(piece):
          found = extract_features(self._params, self._place(next(images)))
          for kind in KINDS:
            rows[kind].append(_gathered(getattr(found, kind))[: len(batch)])
          bar.update(len(batch))
        if jax.process_index() == 0:
          _save(_file(folder, piece), {k: np.concatenate(rows[k]) for k in KINDS})

  def _batches(self, piece: range) -> list[range]:
    starts = range(0, len(piece), self._batch_size)
    return [piece[start : start + self._batch_size] for start in starts]

  def _place(self, images: np.ndarray) -> jax.Array:
    """This host's rows, with empty ones at the end -> the whole batch."""
    rows = self._batch_size // jax.process_count()
    width = [(0, rows - len(images))] + [(0, 0)] * 3
    return to_global({"image": np.pad(images, width)}, self._mesh)["image"]


def _share(batch: range, batch_size: int) -> range:
  """The rows of a batch that this host reads."""
  rows = batch_size // jax.process_count()
  first = jax.process_index() * rows
  return batch[first : first + rows]


def _ahead(items: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The same items, each read while the one before it is in use."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    following = pool.submit(next, items, None)
    while (item := following.result()) is not None:
      following = pool.submit(next, items, None)
      yield item


def _gathered(x: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _file(folder: epath.Path, piece: range) -> epath.Path:
  return folder / f"{piece.start:08d}-{piece.stop:08d}.npz"


def _save(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_name(f".{file.name}.part")
  with part.open("wb") as stream:
    np.savez(stream, **arrays)
  part.replace(file)


def _load(file: epath.Path) -> dict[str, np.ndarray]:
  with file.open("rb") as stream, np.load(stream) as found:
    return dict(found)
