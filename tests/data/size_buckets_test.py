"""Batches of several sizes: shares, order, and going on from any step."""

import itertools

import jax
import numpy as np
import pytest

from llamagen_jax.data.loader import Stream, check_position
from llamagen_jax.data.size_buckets import PERIOD, SizeBuckets, steps_of_buckets
from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import make_mesh


def element(value, rng):
  return {"x": np.full(value // 1000, value)}


def buckets(counts=(30, 10)) -> SizeBuckets:
  """Element k of bucket i is a row of 1 + i numbers, all 1000 (1 + i) + k."""
  return SizeBuckets([
    Stream(1000 * (1 + i) + np.arange(count), element, batch_size=2, seed=3)
    for i, count in enumerate(counts)
  ])  # fmt: skip


def batches(start: int, count: int) -> list[np.ndarray]:
  with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
    stream = itertools.islice(buckets().batches(mesh, start), count)
    return [np.asarray(batch["x"]) for batch in stream]


def test_every_bucket_has_its_share_of_the_steps():
  stream = buckets()
  steps = [stream.bucket(step) for step in range(PERIOD)]
  assert [steps.count(0), steps.count(1)] == [75, 25]
  assert steps[:10] != sorted(steps[:10])
  assert [stream.bucket(PERIOD + step) for step in range(PERIOD)] == steps


@pytest.mark.parametrize("records", [(1, 1_000_000), (5, 5, 5), (7,) * 40])
def test_shares_are_whole_steps_and_one_at_least(records):
  counts = steps_of_buckets(records, PERIOD)
  assert counts.sum() == PERIOD and counts.min() >= 1
  expected = np.array(records) / sum(records) * PERIOD
  assert np.abs(counts - expected).max() <= 1 + len(records) * expected.max() / PERIOD


def test_a_batch_is_of_one_bucket_and_all_records_come():
  seen = {1: set(), 2: set()}
  for step, batch in enumerate(batches(0, 30)):
    width = batch.shape[1]
    assert width == 1 + buckets().bucket(step)
    seen[width] |= set(batch[:, 0].tolist())
  assert seen[1] == set(range(1000, 1030)) and seen[2] == set(range(2000, 2010))


@pytest.mark.parametrize("start", [1, 17, 130])
def test_goes_on_from_any_step(start):
  for one, other in zip(batches(0, start + 9)[start:], batches(start, 9), strict=True):
    np.testing.assert_array_equal(one, other)


def test_other_records_are_refused():
  position = buckets().position(5)
  check_position(buckets(), position)
  with pytest.raises(UserError, match=r"records=\[30, 10\], this run has \[30, 11\]"):
    check_position(buckets((30, 11)), position)
