"""Features of many images: over all devices and hosts, kept on disk.

They are kept in pieces, in a folder that is named by the content of the images and
of the weights. A rerun reads them in seconds, and one that was killed goes on with
the pieces that are missing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

from llamagen_jax.evaluation.image_sets import ImageSet
from llamagen_jax.parallel.mesh import replicated, shard_tree, to_global
from llamagen_jax.vision.inception import extract_features
from llamagen_jax.weights import bundle

CACHE = "~/.cache/llamagen_jax/features"
PIECE = 4096  # images whose features are one file


class CachedImageMap:
  """Runs a network over images, over all devices and hosts, and keeps what it says.

  All hosts use it together; each reads its share of the images. Host 0 alone reads
  and writes the cache.
  """

  def __init__(self, mesh: Mesh, batch_size: int, cache: str | os.PathLike):
    """Takes the mesh of all devices, images at a time on each, and a folder."""
    self.mesh, self._batch_size = mesh, batch_size * mesh.size
    self._cache = epath.Path(os.path.expanduser(cache))

  def __call__(
    self,
    source: ImageSet,
    what: str,
    identity: str,
    apply: Callable[..., dict[str, jax.Array]],
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    beside: Sequence[np.ndarray] = (),
  ) -> dict[str, np.ndarray]:
    """Values of all images [N, ..] on host 0, and nothing elsewhere.

    Args:
      source: the images.
      what: they are, for the progress bar.
      identity: of the network and of all else that the values depend on.
      apply: images [B, H, W, 3] and rows of `beside` -> values [B, ..] by name.
      prepare: uint8 images -> what `apply` takes, on the host.
      beside: arrays [N, ..] of which every image has a row.
    """
    names = f"{source.sha256} {identity}"
    folder = self._cache / hashlib.sha256(names.encode()).hexdigest()[:40]
    pieces = [
      range(start, min(start + PIECE, source.count))
      for start in range(0, source.count, PIECE)
    ]
    missing = [not _file(folder, piece).exists() for piece in pieces]
    # One host decides, so that all agree.
    missing = multihost_utils.broadcast_one_to_all(np.array(missing))
    todo = [piece for piece, absent in zip(pieces, missing, strict=True) if absent]
    batches = [batch for piece in todo for batch in self._batches(piece)]
    shares = [self._share(batch) for batch in batches]
    images = _ahead(map(prepare, source.read(shares)))
    with tqdm.tqdm(
      total=source.count, initial=source.count - sum(map(len, todo)), desc=what,
      unit="image", dynamic_ncols=True, disable=jax.process_index() != 0 or not todo,
    ) as bar:  # fmt: skip
      for piece in todo:
        parts = []
        for batch in self._batches(piece):
          rows = [next(images), *(x[self._slice(batch)] for x in beside)]
          found = apply(*map(self._place, rows))
          parts.append({k: _gathered(v)[: len(batch)] for k, v in found.items()})
          bar.update(len(batch))
        if jax.process_index() == 0:
          _save(_file(folder, piece), _joined(parts))
    if jax.process_index() != 0:
      return {}
    return _joined([_load(_file(folder, piece)) for piece in pieces])

  def _batches(self, piece: range) -> list[range]:
    starts = range(0, len(piece), self._batch_size)
    return [piece[start : start + self._batch_size] for start in starts]

  def _share(self, batch: range) -> range:
    """The rows of a batch that this host reads."""
    rows = self._batch_size // jax.process_count()
    first = jax.process_index() * rows
    return batch[first : first + rows]

  def _slice(self, batch: range) -> slice:
    share = self._share(batch)
    return slice(share.start, share.stop)

  def _place(self, rows: np.ndarray) -> jax.Array:
    """This host's rows, with empty ones at the end -> the whole batch."""
    wanted = self._batch_size // jax.process_count()
    width = [(0, wanted - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return to_global({"rows": np.pad(rows, width)}, self.mesh)["rows"]


class Extractor:
  """Images -> Inception's features: float32 pool [N, 2048] and spatial [N, 2023]."""

  def __init__(self, params: Any, values: CachedImageMap):
    """Takes what `weights.inception.load_inception` reads, whole on every host."""
    self._values = values
    self._params = shard_tree(params, replicated(values.mesh))
    self.identity = bundle.fingerprint(self._params)
    self._head = np.asarray(params["head"], np.float64)

  def __call__(self, source: ImageSet, what: str) -> dict[str, np.ndarray]:
    """Features on host 0; `what` names the images in the progress bar."""

    def apply(images):
      found = extract_features(self._params, images)
      return {"pool": found.pool, "spatial": found.spatial}

    return self._values(source, what, self.identity, apply)

  def logits(self, pool_NC: np.ndarray) -> np.ndarray:
    """Logits without the bias [N, 1008], from pooled features."""
    return pool_NC.astype(np.float64) @ self._head


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


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
