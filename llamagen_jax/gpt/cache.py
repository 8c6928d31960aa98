"""Keys and values of the positions that the transformer has read.

Positions lie last, which is how both products of attention read them fastest.

Axes: B batch, T tokens, S cache length, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.parallel.mesh import on_every_part


class LayerCache(NamedTuple):
  """Keys and values of one layer."""

  keys: jax.Array  # [B, K, H, S]
  values: jax.Array  # [B, K, H, S]


Cache = tuple[LayerCache, ...]  # one a layer


def init_cache(config: GPTConfig, batch: int, length: int) -> Cache:
  """Returns an empty cache for the positions 0 .. `length` - 1."""
  c = config
  empty = jnp.zeros((batch, c.num_kv_heads, c.head_dim, length), c.dtype)
  return tuple(LayerCache(empty, empty) for _ in range(c.layers))


def grow_cache(cache: Cache, length: int) -> Cache:
  """Returns the same cache with room for `length` positions."""
  more = length - cache_length(cache)
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, more)]), cache)


def cache_length(cache: Cache) -> int:
  """Returns the number of positions that a cache has room for."""
  return cache[0].keys.shape[-1]


def as_cache(k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
  """Lays keys and values of T tokens out as a cache of length T."""
  return LayerCache(k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 3, 1))


def write_cache(
  old: LayerCache, new: LayerCache, position: jax.Array | int
) -> LayerCache:
  """Writes `new` from `position` on, in place where the caller lets go of `old`."""

  def put(old, new):
    start = (0, 0, 0, position)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

  return jax.tree.map(put, old, new)


def pin_layout(cache: LayerCache) -> LayerCache:
  """Keeps positions in a TPU's lanes, where a loop carries a cache.

  Left to itself the compiler puts the batch there, because that makes the writes
  cheapest: every cache is then copied before and after the loop, and padded to
  128 rows in between.
  """

  def pin_part(x):
    layout = Layout((0, 1, 2, 3))
    return jax.lax.platform_dependent(
      x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )

  def pin(x):
    return on_every_part(pin_part, x, "batch", "kv_heads", None, None)

  return jax.tree.map(pin, cache)
