import types

import jax
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.loader import Stream, check_position, epoch_batches
from llamagen_jax.data.size_buckets import SizeBuckets
from llamagen_jax.parallel.mesh import make_mesh

RECORDS = 12


def transform(element, rng):
  return {"id": np.int32(element), "noise": rng.random(2, np.float32)}


def stream(**changes) -> Stream:
  fields = {
    "source": range(RECORDS),
    "transform": transform,
    "batch_size": 4,
    "seed": 3,
  }
  return Stream(**(fields | changes))


def take(batches, count: int):
  return [next(batches) for _ in range(count)]


def assert_equal(batches, others):
  for a, b in zip(batches, others, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_a_function_of_seed_and_step(workers):
  whole = take(stream().host_batches(0), 9)
  assert_equal(whole[5:], take(stream(workers=workers).host_batches(5), 4))
  other = take(stream(seed=4).host_batches(0), 9)
  assert any((a["id"] != b["id"]).any() for a, b in zip(whole, other, strict=True))


def test_every_epoch_has_every_record_in_a_new_order():
  ids = np.concatenate([b["id"] for b in take(stream().host_batches(0), 9)])
  epochs = ids.reshape(3, RECORDS)
  for epoch in epochs:
    assert sorted(epoch) == list(range(RECORDS))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_of_hosts_are_those_of_the_whole_batches():
  """Neighbours or not, and also where two hosts hold the same ones."""
  whole = take(stream().host_batches(0), 6)
  for rows in ([0, 1], [2, 3], [0, 3], [1], [0, 1, 2, 3]):
    part = take(stream().host_batches(2, rows), 4)
    assert_equal([{n: x[rows] for n, x in b.items()} for b in whole[2:]], part)


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_that_the_mesh_does_not_divide_is_refused_at_once(several):
  """Before anything of the run is written."""
  mesh = types.SimpleNamespace(shape={"data": 3, "fsdp": 1})
  source = SizeBuckets([stream(), stream()]) if several else stream()
  with pytest.raises(UserError, match="batch_size=4 is not a multiple .* = 3 chips"):
    source.batches(mesh, 0)


def test_bad_elements_are_counted_over_the_source_not_the_batch():
  def bad(element, rng):
    return {"id": np.int32(element), "replaced": np.int32(element == 5)}

  batches = stream(transform=bad, max_bad_share=1 / RECORDS).host_batches(0)
  for batch in take(batches, 3):
    assert "replaced" not in batch
  assert len(take(batches, 6)) == 6  # once an epoch is still one in twelve
  with pytest.raises(UserError, match="1 bad images among .* 12 in"):
    take(stream(transform=bad).host_batches(0), 3)


def test_each_of_several_hosts_lets_through_its_share_of_bad_elements():
  def bad(element, rng):
    return {"id": np.int32(element), "replaced": np.int32(element < 3)}

  batches = stream(transform=bad, max_bad_share=1 / RECORDS).host_batches(0, [0, 1])
  with pytest.raises(UserError, match="bad images among"):
    take(batches, 3)  # half of an epoch: one of six elements at most


def test_batches_lie_on_the_mesh():
  mesh = make_mesh()
  batch = next(stream(batch_size=8).batches(mesh, 0))
  assert batch["id"].shape == (8,)
  assert batch["id"].sharding.mesh.shape == mesh.shape


def test_a_resumed_stream_must_be_the_same_data():
  position = stream().position(7)
  check_position(stream(), position)
  for changes, word in (
    ({"batch_size": 8}, "batch_size=4"),
    ({"seed": 9}, "seed=3"),
    ({"source": range(11)}, "records=12"),
  ):
    with pytest.raises(UserError, match=word):
      check_position(stream(**changes), position)


def test_an_epoch_is_in_order_and_its_filling_weighs_nothing():
  batches = list(
    epoch_batches(range(10), lambda i: {"id": np.int32(i)}, 4, make_mesh())
  )
  ids, weights = (
    np.concatenate([np.asarray(b[name]) for b in batches]) for name in ("id", "weight")
  )
  np.testing.assert_array_equal(ids[weights == 1], range(10))
  assert len(ids) == 12
  assert jax.device_count() >= 1
