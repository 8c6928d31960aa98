"""Features of many images: over all devices and hosts, cached in files.

A folder of shards is named by the content of the images and of the weights, so a rerun
reads them in seconds, and one that was killed goes on with the shards that are missing.
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
from llamagen_jax.storage import atomic_write, user_path
from llamagen_jax.vision.inception import extract_features
from llamagen_jax.weights import bundle

CACHE = "~/.cache/llamagen_jax/features"
SHARD_IMAGES = 4096  # images whose features are one file

Apply = Callable[..., dict[str, jax.Array]]


class CachedImageMap:
  """Runs a network over images, over all devices and hosts, and caches its outputs.

  All hosts use it together; each reads its share of the images. Host 0 alone reads
  and writes the cache.
  """

  def __init__(self, mesh: Mesh, batch_size: int, cache: str | os.PathLike):
    """Takes `make_data_mesh()`, images at a time on every device, and a folder."""
    self.mesh, self._batch_size = mesh, batch_size * mesh.size
    self._cache = user_path(cache)

  def __call__(
    self,
    images: ImageSet,
    label: str,
    identity: str,
    apply: Apply,
    *,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    beside: Sequence[np.ndarray] = (),
  ) -> dict[str, np.ndarray]:
    """Returns the outputs for all images [N, ..] on host 0, and nothing elsewhere.

    Args:
      images: the images.
      label: of the progress bar.
      identity: of the network and of all else that the outputs depend on.
      apply: images [B, H, W, 3] and rows of `beside` -> outputs [B, ..] by name.
      prepare: uint8 images -> the first argument of `apply`, on the host.
      beside: arrays [N, ..] of which every image has a row.
    """
    names = f"{images.sha256} {identity}"
    folder = self._cache / hashlib.sha256(names.encode()).hexdigest()[:40]
    shards = _ranges(range(images.count), SHARD_IMAGES)
    todo = _missing(folder, shards)
    batches = [batch for shard in todo for batch in _ranges(shard, self._batch_size)]
    loaded = _read_ahead(map(prepare, images.read(map(self._share, batches))))
    with tqdm.tqdm(
      total=images.count, initial=images.count - sum(map(len, todo)), desc=label,
      unit="image", dynamic_ncols=True, disable=jax.process_index() != 0 or not todo,
    ) as bar:  # fmt: skip
      for shard in todo:
        outputs = []
        for batch in _ranges(shard, self._batch_size):
          outputs.append(self._run(apply, batch, next(loaded), beside))
          bar.update(len(batch))
        if jax.process_index() == 0:
          _save(_file(folder, shard), _joined(outputs))
    if jax.process_index() != 0:
      return {}
    return _joined([_load(_file(folder, shard)) for shard in shards])

  def _run(
    self, apply: Apply, batch: range, images: np.ndarray, beside: Sequence[np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns the outputs of one batch, of which `images` are this host's."""
    share = self._share(batch)
    rows = [images, *(x[share.start : share.stop] for x in beside)]
    outputs = apply(*map(self._to_devices, rows))
    return {name: _gathered(x)[: len(batch)] for name, x in outputs.items()}

  def _share(self, batch: range) -> range:
    """Returns the images of a batch that this host reads."""
    count = self._batch_size // jax.process_count()
    first = jax.process_index() * count
    return batch[first : first + count]

  def _to_devices(self, rows: np.ndarray) -> jax.Array:
    """Returns the whole batch of this host's rows, with zeros at the end."""
    count = self._batch_size // jax.process_count()
    padding = [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return to_global({"rows": np.pad(rows, padding)}, self.mesh)["rows"]


class Extractor:
  """Images -> Inception's features: float32 pool [N, 2048] and spatial [N, 2023]."""

  def __init__(self, params: Any, images_map: CachedImageMap):
    """Takes the output of `weights.inception.load_inception`, whole on every host."""
    self._map = images_map
    self._params = shard_tree(params, replicated(images_map.mesh))
    self.identity = bundle.fingerprint(self._params)
    self._head = np.asarray(params["head"], np.float64)

  def __call__(self, images: ImageSet, label: str) -> dict[str, np.ndarray]:
    """Returns the features on host 0; `label` names the images in the progress bar."""

    def apply(images):
      features = extract_features(self._params, images)
      return {"pool": features.pool, "spatial": features.spatial}

    return self._map(images, label, self.identity, apply)

  def logits(self, pool_NC: np.ndarray) -> np.ndarray:
    """Returns logits without the bias [N, 1008] of pooled features."""
    return pool_NC.astype(np.float64) @ self._head


def _ranges(whole: range, size: int) -> list[range]:
  """Cuts a range into ranges of `size` and a last one that may be shorter."""
  return [whole[i : i + size] for i in range(0, len(whole), size)]


def _missing(folder: epath.Path, shards: list[range]) -> list[range]:
  """Returns the shards without a file, as host 0 sees it, so that all hosts agree."""
  missing = np.array([not _file(folder, shard).exists() for shard in shards])
  missing = multihost_utils.broadcast_one_to_all(missing)
  return [shard for shard, absent in zip(shards, missing, strict=True) if absent]


def _read_ahead(items: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields the same items, each read while the one before it is in use."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    following = pool.submit(next, items, None)
    while (item := following.result()) is not None:
      following = pool.submit(next, items, None)
      yield item


def _gathered(x: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _joined(outputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([x[name] for x in outputs]) for name in outputs[0]}


def _file(folder: epath.Path, shard: range) -> epath.Path:
  return folder / f"{shard.start:08d}-{shard.stop:08d}.npz"


def _save(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic_write(file) as stream:
    np.savez(stream, **arrays)


def _load(file: epath.Path) -> dict[str, np.ndarray]:
  with file.open("rb") as stream, np.load(stream) as arrays:
    return dict(arrays)
