"""Batches of images of several sizes: each batch is of one size, a bucket."""

from collections.abc import Iterator, Sequence
import itertools
from typing import Any

from jax.sharding import Mesh
import numpy as np

from llamagen_jax.data.loader import Batch, Stream

PERIOD = 100  # steps after which the order of the buckets repeats


class SizeBuckets:
  """An endless stream that takes every batch from one of several streams.

  Which one is a function of (seed, step): of every PERIOD steps each bucket has its
  share of the records, rounded, and one step at least. The position of each stream is
  therefore known, too, and a run continues with the same data.
  """

  def __init__(self, streams: Sequence[Stream]):
    self._streams = streams
    self.batch_size = streams[0].batch_size
    records = [len(stream.source) for stream in streams]
    counts = steps_of_buckets(records, max(PERIOD, len(records)))
    order = np.repeat(np.arange(len(streams)), counts)
    self._order = np.random.default_rng(streams[0].seed).permutation(order)

  def bucket(self, step: int) -> int:
    """Returns the number of the stream that a step's batch is from."""
    return int(self._order[step % len(self._order)])

  def batches(self, mesh: Mesh, start: int) -> Iterator[Batch]:
    """Returns global arrays from step `start` on, as `Stream.batches` does."""
    parts = [
      stream.batches(mesh, self._batches_before(start, number))
      for number, stream in enumerate(self._streams)
    ]
    return (next(parts[self.bucket(step)]) for step in itertools.count(start))

  def position(self, step: int) -> dict[str, Any]:
    """What a checkpoint stores, and what a resumed stream must agree with."""
    parts = [stream.position(step) for stream in self._streams]
    return parts[0] | {"records": [part["records"] for part in parts]}

  def _batches_before(self, step: int, bucket: int) -> int:
    """Returns how many batches of a bucket come before a step."""
    periods, rest = divmod(step, len(self._order))
    mine = self._order == bucket
    return periods * int(mine.sum()) + int(mine[:rest].sum())


def steps_of_buckets(records: Sequence[int], steps: int) -> np.ndarray:
  """Returns how many of some steps each bucket has, one at least, int [buckets].

  They are in proportion to the records, by the method of largest remainders.
  """
  shares = np.array(records) / sum(records) * (steps - len(records))
  counts = np.floor(shares).astype(int)
  most = np.argsort(counts - shares, kind="stable")
  counts[most[: steps - len(records) - counts.sum()]] += 1
  return counts + 1
