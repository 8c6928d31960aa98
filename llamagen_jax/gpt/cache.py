"""Keys and values of the positions that the transformer has read.

Positions lie last, which is how both products of attention read them fastest.

In 8 bits, keys and values of a token are whole numbers times a scale a kv head. The
scales are applied to scores and to weights of the softmax, so that no copy of a cache
in floating point is ever needed. The condition's tokens are kept as they are: they have
extreme values, and every code reads them (KVQuant, arXiv 2401.18079).

Axes: B batch, T tokens, S cache length, P condition tokens, K kv heads, H head dim.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.quantized import quantize
from llamagen_jax.parallel.mesh import on_every_part


class LayerCache(NamedTuple):
  """Keys and values of one layer; with scales, whole numbers times these."""

  keys: jax.Array  # [B, K, H, S]
  values: jax.Array  # [B, K, H, S]
  key_scale: jax.Array | None = None  # [B, K, S]
  value_scale: jax.Array | None = None  # [B, K, S]


class SplitCache(NamedTuple):
  """Keys and values of one layer, those of its codes in 8 bits."""

  prefix: LayerCache  # of the condition, positions 0 .. P - 1
  # Of the positions P - 1 .. S - 1. Its first entry is never read: it takes what the
  # chunk of a new image writes of the last condition token.
  codes: LayerCache


Cache = tuple[LayerCache | SplitCache, ...]  # one a layer


def init_cache(config: GPTConfig, batch: int, length: int) -> Cache:
  """Returns an empty cache for the positions 0 .. `length` - 1."""
  c = config
  if c.kv_cache == "float":
    return (_empty(c, batch, length, c.dtype),) * c.layers
  prefix = _empty(c, batch, c.prefix_tokens, c.dtype)
  codes = _empty(c, batch, length - c.prefix_tokens + 1, "int8")
  return (SplitCache(prefix, _scaled(codes, c.dtype)),) * c.layers


def init_chunk_cache(config: GPTConfig, batch: int, length: int) -> Cache:
  """Returns an empty cache for `length` tokens, of the condition or codes."""
  chunk = _empty(config, batch, length, config.dtype)
  if config.kv_cache != "float":
    chunk = _scaled(chunk, config.dtype)
  return (chunk,) * config.layers


def _empty(config: GPTConfig, batch: int, length: int, dtype: str) -> LayerCache:
  c = config
  empty = jnp.zeros((batch, c.num_kv_heads, c.head_dim, length), dtype)
  return LayerCache(empty, empty)


def _scaled(empty: LayerCache, dtype: str) -> LayerCache:
  scale = jnp.zeros(empty.keys[:, :, 0].shape, dtype)
  return empty._replace(key_scale=scale, value_scale=scale)


def resize_cache(cache: Cache, length: int) -> Cache:
  """Returns the same cache with room for more or fewer positions, `length` of them."""
  more = length - cache_length(cache)

  def resize(layer: LayerCache | SplitCache) -> LayerCache | SplitCache:
    if isinstance(layer, SplitCache):
      return layer._replace(codes=resize(layer.codes))

    def at_end(x):
      widths = [(0, 0, 0)] * (x.ndim - 1) + [(0, more, 0)]
      return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)

    return jax.tree.map(at_end, layer)

  return tuple(map(resize, cache))


def cache_length(cache: Cache) -> int:
  """Returns the number of positions that a cache has room for."""
  layer = cache[0]
  if isinstance(layer, SplitCache):
    return layer.prefix.keys.shape[-1] - 1 + layer.codes.keys.shape[-1]
  return layer.keys.shape[-1]


def as_cache(k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
  """Lays keys and values of T tokens out as a cache of length T."""
  return LayerCache(k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 3, 1))


def as_code_cache(
  config: GPTConfig,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  is_condition_BT: jax.Array | None = None,
) -> LayerCache:
  """Does the same, with codes' keys and values rounded as the config's cache has them.

  Rounded ones are whole numbers in the dtype of the arguments, beside their scales.

  Args:
    config: of the model.
    k_BTKH: keys.
    v_BTKH: values.
    is_condition_BT: tokens to keep as they are; None = there are none.
  """
  if config.kv_cache == "float":
    return as_cache(k_BTKH, v_BTKH)

  def rounded(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    whole_BTKH, scale_BTK = quantize(x_BTKH, x_BTKH.dtype)
    whole_BTKH = whole_BTKH.astype(x_BTKH.dtype)
    if is_condition_BT is not None:
      whole_BTKH = jnp.where(is_condition_BT[..., None, None], x_BTKH, whole_BTKH)
      scale_BTK = jnp.where(is_condition_BT[..., None], 1, scale_BTK)
    return whole_BTKH, scale_BTK.transpose(0, 2, 1)

  keys_BTKH, key_scale = rounded(k_BTKH)
  values_BTKH, value_scale = rounded(v_BTKH)
  return as_cache(keys_BTKH, values_BTKH)._replace(
    key_scale=key_scale, value_scale=value_scale
  )


def write_cache(
  old: LayerCache, new: LayerCache, position: jax.Array | int
) -> LayerCache:
  """Writes `new` from `position` on, in place where the caller lets go of `old`."""

  def put(old, new):
    start = (*(0,) * (old.ndim - 1), position)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

  return jax.tree.map(put, old, new)


def write_condition(
  old: LayerCache | SplitCache, new: LayerCache
) -> LayerCache | SplitCache:
  """Writes condition tokens from position 0 on, as `write_cache` does."""
  if isinstance(old, SplitCache):
    return old._replace(prefix=write_cache(old.prefix, new, 0))
  return write_cache(old, new, 0)


def write_code(
  old: LayerCache | SplitCache, new: LayerCache, position: jax.Array
) -> LayerCache | SplitCache:
  """Writes a code's entry, from `as_code_cache`, as `write_cache` does."""
  if isinstance(old, SplitCache):
    first = old.prefix.keys.shape[-1] - 1
    return old._replace(codes=write_cache(old.codes, new, position - first))
  return write_cache(old, new, position)


def write_chunk(
  old: LayerCache | SplitCache, chunk: LayerCache, start_B: jax.Array
) -> LayerCache | SplitCache:
  """Writes the entries of a chunk, from a position of its own on in every row."""
  if isinstance(old, SplitCache):
    first = old.prefix.keys.shape[-1] - 1
    is_new_B11P = (start_B[:, None] == first) & (jnp.arange(first + 1) == first)
    is_new_B11P = is_new_B11P[:, None, None]

    def put_last(old, new):  # the last condition token, which such a chunk begins with
      return jnp.where(is_new_B11P, new[..., :1], old)

    token = LayerCache(chunk.keys, chunk.values)
    prefix = jax.tree.map(put_last, old.prefix, token)
    return SplitCache(prefix, write_chunk(old.codes, chunk, start_B - first))
  put_each = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-1))
  return jax.tree.map(lambda x, y: put_each(x, y.astype(x.dtype), start_B), old, chunk)


def pin_layout(cache: LayerCache | SplitCache) -> LayerCache | SplitCache:
  """Keeps positions in a TPU's lanes, where a loop carries a cache.

  Left to itself the compiler puts the batch there, because that makes the writes
  cheapest: every cache is then copied before and after the loop, and padded to
  128 rows in between. A prefix, which no loop writes to, may be a single position,
  which lanes would pad to 128.
  """
  if isinstance(cache, SplitCache):
    return cache._replace(codes=pin_layout(cache.codes))

  def pin_part(x):
    layout = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
      x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )

  def pin(x):
    return on_every_part(pin_part, x, "batch", "kv_heads", *(None,) * (x.ndim - 2))

  return jax.tree.map(pin, cache)
