"""From a source to global arrays on the mesh.

The stream of batches is a pure function of (seed, step): shuffle, repeat, random
transform seeded by the position, batch. Its position is therefore the step, and
a run continues with the same data on any number of hosts and workers.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any

import grain
import jax
from jax.sharding import Mesh
import numpy as np

from llamagen_jax.data.workers import in_processes
from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import host_rows, to_global

HostBatch = dict[str, np.ndarray]
Batch = dict[str, jax.Array]

READ_THREADS = 4  # of a process; records are small and local
BUFFERED_BATCHES = 2  # a worker, or the host where there are no workers


@dataclasses.dataclass(frozen=True)
class Stream:
  """An endless, shuffled stream of training batches.

  `transform(element, rng)` makes a dict of fixed-shape arrays. Its entry
  `replaced`, if there is one, counts elements that could not be used; the stream
  ends with an error once they exceed `max_bad_share` of a host's share of the source.
  """

  source: Any  # random access: len() and []
  transform: Callable[[Any, np.random.Generator], HostBatch]
  batch_size: int  # over all hosts
  seed: int
  workers: int = 0  # processes that read and transform; 0 = threads of this one
  max_bad_share: float = 0.0

  def host_batches(
    self, start: int, rows: Sequence[int] | None = None
  ) -> Iterator[HostBatch]:
    """Returns some rows, by default all, of the batches from step `start` on."""
    rows = range(self.batch_size) if rows is None else rows
    elements = (
      grain.MapDataset.source(self.source)
      .seed(self.seed)
      .shuffle()
      .repeat()
      .random_map(self.transform)
    )
    dataset = grain.MapDataset.source(_Rows(elements, self.batch_size, rows))[start:]
    threads = 0 if self.workers else READ_THREADS
    options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(threads, BUFFERED_BATCHES)
    )
    batches = dataset.to_iter_dataset(options)
    if self.workers:
      batches = in_processes(batches, self.workers, BUFFERED_BATCHES)
    return self._checked(iter(batches), len(rows) / self.batch_size)

  def batches(self, mesh: Mesh, start: int) -> Iterator[Batch]:
    """Returns global arrays, the batch axis over the mesh's data and fsdp axes.

    A host reads the rows that its chips hold, so that a batch is the same, row by row,
    on any number of hosts.
    """
    if self.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
      raise UserError(
        f"data.batch_size={self.batch_size} is not a multiple of the mesh's"
        f" data * fsdp = {mesh.shape['data'] * mesh.shape['fsdp']} chips"
      )
    batches = self.host_batches(start, host_rows(mesh, self.batch_size).tolist())
    return (to_global(batch, mesh) for batch in batches)

  def bucket(self, step: int) -> int:
    """Returns which of its sources a batch is of: there is one; see `SizeBuckets`."""
    return 0

  def position(self, step: int) -> dict[str, Any]:
    """What a checkpoint stores, and what a resumed stream must agree with."""
    return {
      "next_step": step,
      "seed": self.seed,
      "batch_size": self.batch_size,
      "records": len(self.source),
    }

  def _checked(
    self, batches: grain.DatasetIterator, share: float
  ) -> Iterator[HostBatch]:
    seen = bad = 0
    own = len(self.source) * share  # elements of an epoch on this host
    try:
      for batch in batches:
        seen += len(next(iter(batch.values())))
        bad += int(np.sum(batch.pop("replaced", 0)))
        if bad > self.max_bad_share * math.ceil(seen / own) * own:
          raise UserError(
            f"{bad} bad images among {seen} read (the log names them): more than"
            f" data.max_bad_share={self.max_bad_share} of the {len(self.source)} in"
            " the source"
          )
        yield batch
    finally:
      batches.close()  # Grain 0.2.18 prints tracebacks when Python ends before that


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Some rows of every batch of elements, as a source of Grain."""

  elements: grain.MapDataset
  batch_size: int
  rows: Sequence[int]

  def __len__(self) -> int:
    return len(self.elements) // self.batch_size

  def __getitem__(self, step: int) -> HostBatch:
    first = step * self.batch_size
    found = [self.elements[first + row] for row in self.rows]
    return {name: np.stack([x[name] for x in found]) for name in found[0]}


def check_position(stream: Any, position: dict[str, Any]) -> None:
  """Refuses to continue a stream over other data than a checkpoint's position says."""
  for name, expected in stream.position(position["next_step"]).items():
    if position[name] != expected:
      raise UserError(
        f"the checkpoint's data stream has {name}={position[name]}, this run"
        f" has {expected}: the order of the data would change"
      )


def epoch_batches(
  source: Any,
  transform: Callable[[Any], HostBatch],
  batch_size: int,
  mesh: Mesh,
  *,
  shuffle: bool = False,
) -> Iterator[Batch]:
  """One pass, for evaluation; shuffled, its first batch is one of all classes.

  Every element has a `weight`, which is 0 for what fills up the last batch.
  """
  dataset = grain.MapDataset.source(source)
  if shuffle:
    dataset = dataset.shuffle(seed=0)
  count = len(source)

  def row(index: int) -> HostBatch:
    element = transform(dataset[min(index, count - 1)])
    weight = np.float32(element.get("weight", 1) * (index < count))
    return element | {"weight": weight}

  elements = grain.MapDataset.range(-(-count // batch_size) * batch_size).map(row)
  own = _Rows(elements, batch_size, host_rows(mesh, batch_size).tolist())
  options = grain.ReadOptions(READ_THREADS, READ_THREADS)
  for batch in grain.MapDataset.source(own).to_iter_dataset(options):
    yield to_global(batch, mesh)
