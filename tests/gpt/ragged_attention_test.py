"""The TPU's kernel over rows of different lengths, interpreted: the sums of XLA."""

import contextlib
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax.gpt.cache import LayerCache
from llamagen_jax.gpt.cached_attention import SoftmaxPartial, attend_part, merge
from llamagen_jax.gpt.ragged_attention import (
  BLOCK,
  attend_ragged,
  blocks_to_read,
  list_blocks,
  mean_blocks,
)

K, H, S = 2, 8, 300
LENGTHS = np.array([0, 1, 127, 128, 129, S])
B = len(LENGTHS)


@contextlib.contextmanager
def interpreted():
  """Interprets the kernel on any backend; blocks that go over an end hold NaN there."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    patch.setattr(pltpu, "with_memory_space_constraint", lambda x, space: x)
    attend_ragged.clear_cache()
    yield
  attend_ragged.clear_cache()


def normal(*shape, seed=0, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def example(R: int, dtype: str) -> tuple[jax.Array, LayerCache]:
  """Returns scaled queries and a full cache, of 8 bits if the dtype says so."""
  compute = "float32" if dtype == "int8" else dtype
  q_BKRH = normal(B, K, R, H, dtype=compute)
  keys, values = (normal(B, K, H, S, seed=s, dtype=compute) for s in (1, 2))
  if dtype != "int8":
    return q_BKRH, LayerCache(keys, values)
  scales = [jnp.abs(normal(B, K, S, seed=s)) / 32 for s in (3, 4)]
  whole = [jnp.round(32 * x).astype("int8") for x in (keys, values)]
  return q_BKRH, LayerCache(*whole, *scales)


def masks() -> dict[str, np.ndarray]:
  written_B1S = np.arange(S) < LENGTHS[:, None, None]
  padded_B1S = np.arange(S) >= np.array([0, 0, 5, 3, 129, 200])[:, None, None]
  return {"lengths": written_B1S, "padding": written_B1S & padded_B1S}


def spoilt(cache: LayerCache, mask_B1S: np.ndarray) -> LayerCache:
  """Returns a cache with NaN, or the largest numbers, where the mask hides it."""

  def spoil(x):
    visible = mask_B1S[:, :, None] if x.ndim == 4 else mask_B1S
    wrong = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 127
    return jnp.where(visible, x, wrong)

  return jax.tree.map(spoil, cache)


@pytest.mark.parametrize("mask", ["lengths", "padding"])
@pytest.mark.parametrize(
  "R, dtype, tolerance",
  [(1, "float32", 2e-6), (8, "float32", 2e-6), (1, "int8", 2e-6), (4, "int8", 2e-6),
   (2, "bfloat16", 1e-2)],
)  # fmt: skip
def test_is_the_attention_of_xla(R, dtype, tolerance, mask):
  """One token or four, of one query head or two; what is hidden may be anything."""
  q_BKRH, cache = example(R, dtype)
  mask_B1S = masks()[mask]
  expected = attend_part(q_BKRH, cache, mask_B1S[:, :, None])
  with interpreted():
    found = SoftmaxPartial(*attend_ragged(q_BKRH, spoilt(cache, mask_B1S), mask_B1S))
  empty = ~mask_B1S.any(axis=-1)[:, 0]
  assert empty.sum() == (1 if mask == "lengths" else 2)
  for x, y in zip(found, expected, strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype == "float32"
  assert not np.asarray(found.denominator)[empty].any()
  assert not np.asarray(found.numerator)[empty].any()
  # Beside another part, whose softmax has to be merged with it.
  other = attend_part(q_BKRH, *example_chunk(q_BKRH))
  np.testing.assert_allclose(
    merge([other, found]), merge([other, expected]), atol=tolerance
  )
  assert np.abs(merge([other, found]) - merge([other]))[~empty].max() > 0.1


def example_chunk(q_BKRH: jax.Array) -> tuple[LayerCache, np.ndarray]:
  chunk = LayerCache(*(normal(B, K, H, 3, seed=s, dtype=q_BKRH.dtype) for s in (5, 6)))
  return chunk, np.ones((B, 1, 1, 3), bool)


@pytest.mark.parametrize("mask", ["lengths", "padding"])
def test_reads_the_blocks_up_to_the_last_visible_position(mask):
  mask_B1S = masks()[mask]
  count_B = np.asarray(blocks_to_read(mask_B1S))
  ends = [np.flatnonzero(row).max(initial=0) for row in mask_B1S[:, 0]]
  np.testing.assert_array_equal(count_B, [end // BLOCK + 1 for end in ends])
  row_N, block_N = map(np.asarray, list_blocks(count_B, 3))
  read = list(zip(row_N, block_N, strict=True))[: count_B.sum()]
  assert read == [(b, i) for b in range(B) for i in range(count_B[b])]
  assert row_N.max() < B  # nothing behind the list is out of bounds


def test_the_mean_of_blocks_is_that_of_the_lists():
  length = 584
  mask_S1S = np.arange(length) < np.arange(length)[:, None, None]
  for shortest in (0, 119):
    expected = np.mean(blocks_to_read(mask_S1S[shortest:]))
    assert mean_blocks(shortest, length) == pytest.approx(expected)
