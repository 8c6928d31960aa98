"""Attention of a few tokens over cached keys and values.

A cache may come in parts, each with a mask of its own: the softmax runs over every
part alone, and the partial results are merged. The scales of a part in 8 bits multiply
its scores, and the weights of its values.

Axes: B batch, T tokens, S cache length, K kv heads, G query heads per kv head,
H head dim, R = G T rows of a kv head.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import LayerCache, SplitCache, pin_layout, write_code
from llamagen_jax.gpt.ragged_attention import attend_ragged


class SoftmaxPartial(NamedTuple):
  """Attention over a part of the keys, before it is normalised."""

  max: jax.Array  # of the scores, float32 [B, K, .., 1]
  denominator: jax.Array  # sum of exp(score - max), [B, K, .., 1]
  numerator: jax.Array  # values weighted by exp(score - max), [B, K, .., H]


Part = tuple[LayerCache, jax.Array]  # and its mask, bool [B or 1, T or 1, S]
SUBLANES = 8  # of a TPU
# Queries of all heads and tokens that the kernel takes: so many are compiled for heads
# 64 wide, and the kernel's memory on the chip grows with them.
MOST_QUERIES = 512


def attend_prefill(
  q_BTKGH: jax.Array, cache: LayerCache | SplitCache, mask_BTS: jax.Array
) -> jax.Array:
  """Attends from several condition tokens to one cache by two matmuls.

  Returns:
    [B, T, K, G, H] in the dtype of the queries.
  """
  cache, mask_BTS = cache_parts(cache, mask_BTS)[0]
  scores_BKGTS = jnp.einsum(
    "BTKGH,BKHS->BKGTS", q_BTKGH, cache.keys, preferred_element_type=jnp.float32
  )
  scores_BKGTS = scores_BKGTS * q_BTKGH.shape[-1] ** -0.5
  hidden = jnp.finfo(jnp.float32).min
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, hidden)
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTKGH.dtype)
  return jnp.einsum("BKGTS,BKHS->BTKGH", weights_BKGTS, cache.values)


def write_and_attend(
  q_B1KGH: jax.Array,
  token: LayerCache,
  cache: LayerCache | SplitCache,
  position: jax.Array,
  mask_B1S: jax.Array,
) -> tuple[jax.Array, LayerCache | SplitCache]:
  """Writes one code at `position` into a cache and attends from it.

  Returns:
    The mixed values [B, 1, K, G, H] and the new cache.
  """
  old = pin_layout(cache)
  new = write_code(old, token, position)
  # A TPU would fetch all of a cache to write to it, and take it back, were it read
  # after that; a CPU would copy it, were it read before.
  mixed_B1KGH = jax.lax.platform_dependent(
    tpu=lambda: attend_before_write(q_B1KGH, old, token, position, mask_B1S),
    default=lambda: attend_parts(q_B1KGH, cache_parts(new, mask_B1S)),
  )
  return mixed_B1KGH, pin_layout(new)


def attend_before_write(
  q_B1KGH: jax.Array,
  cache: LayerCache | SplitCache,
  token: LayerCache,
  position: jax.Array,
  mask_B1S: jax.Array,
) -> jax.Array:
  """Attends to a cache that does not hold the token yet, and to the token itself."""
  before_B1S = mask_B1S & (jnp.arange(mask_B1S.shape[-1]) != position)
  itself_111 = jnp.ones((1, 1, 1), bool)
  return attend_parts(q_B1KGH, [*cache_parts(cache, before_B1S), (token, itself_111)])


def cache_parts(cache: LayerCache | SplitCache, mask_BTS: jax.Array) -> list[Part]:
  """Returns the parts of a cache, the one of the condition first."""
  if not isinstance(cache, SplitCache):
    return [(cache, mask_BTS)]
  P = cache.prefix.keys.shape[-1]
  is_code = jnp.arange(cache.codes.keys.shape[-1]) > 0
  return [
    (cache.prefix, mask_BTS[..., :P]),
    (cache.codes, mask_BTS[..., P - 1 :] & is_code),
  ]


def attend_parts(q_BTKGH: jax.Array, parts: Sequence[Part]) -> jax.Array:
  """Attends from T tokens to the parts of a cache.

  Query heads of a single token go one by one, because a row axis of size 1 in the
  product costs a CPU a factor of 20.

  Returns:
    [B, T, K, G, H] in the dtype of the queries.
  """
  T, _, G, H = q_BTKGH.shape[1:]
  if T > 1:
    return _attend_rows(q_BTKGH, parts)
  scaled_BTKGH = q_BTKGH * H**-0.5
  heads = [
    merge([attend_part(scaled_BTKGH[:, 0, :, g], *part) for part in parts])
    for g in range(G)
  ]
  return jnp.stack(heads, axis=2)[:, None].astype(q_BTKGH.dtype)


def attend_beside_chunk(
  q_BTKGH: jax.Array,
  cache: LayerCache | SplitCache,
  mask_B1S: jax.Array,
  chunk: Part,
  shortest: int,
) -> jax.Array:
  """Attends to a cache whose rows end anywhere, and to the chunk of the last tokens.

  A TPU reads the blocks that hold what the mask shows; others read the whole cache.

  Args:
    q_BTKGH: queries.
    cache: of the tokens before the chunk.
    mask_B1S: bool.
    chunk: its keys and values, and their mask.
    shortest: positions that a row with an image has written at least.

  Returns:
    [B, T, K, G, H] in the dtype of the queries.
  """
  *short, long = cache_parts(cache, mask_B1S)

  def by_xla():
    return attend_parts(q_BTKGH, [*short, long, chunk])

  def by_kernel():
    before = mask_B1S.shape[-1] - long[1].shape[-1]  # positions in the parts before
    return _attend_rows(q_BTKGH, [*short, chunk], long, max(0, shortest - before))

  # The compiler lays out heads of other sizes, 100 in 3B, in an order of axes that pads
  # less, and would copy the cache for the kernel.
  _, T, K, G, H = q_BTKGH.shape
  if H % SUBLANES or T * K * G > MOST_QUERIES:
    return by_xla()
  return jax.lax.platform_dependent(tpu=by_kernel, default=by_xla)


def _attend_rows(
  q_BTKGH: jax.Array,
  parts: Sequence[Part],
  ragged: Part | None = None,
  shortest: int = 0,
) -> jax.Array:
  """Attends with the tokens and query heads of a kv head as the rows of a product.

  Args:
    q_BTKGH: queries.
    parts: for XLA.
    ragged: one for the TPU's kernel.
    shortest: positions that its rows hold at least.
  """
  B, T, K, G, H = q_BTKGH.shape
  scaled_BTKGH = q_BTKGH * H**-0.5
  q_BKRH = scaled_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)

  def rows(mask_BTS):
    mask_B1GTS = jnp.broadcast_to(
      mask_BTS[:, None, None], (mask_BTS.shape[0], 1, G, T, mask_BTS.shape[-1])
    )
    return mask_B1GTS.reshape(-1, 1, G * T, mask_BTS.shape[-1])

  partials = [attend_part(q_BKRH, cache, rows(mask_BTS)) for cache, mask_BTS in parts]
  if ragged is not None:
    partials.append(SoftmaxPartial(*attend_ragged(q_BKRH, *ragged, shortest)))
  mixed_BTKGH = merge(partials).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
  return mixed_BTKGH.astype(q_BTKGH.dtype)


def attend_part(q: jax.Array, cache: LayerCache, mask: jax.Array) -> SoftmaxPartial:
  """Attends from scaled queries [B, K, .., H]; the mask is [B or 1, 1, .., S]."""
  # A TPU reads 8 bits and converts them on the way into the product.
  keys, values = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
  scores = jnp.einsum(
    "BK...H,BKHS->BK...S", q, keys, preferred_element_type=jnp.float32
  )
  if cache.key_scale is not None:
    scores = scores * _per_row(cache.key_scale, scores)
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  highest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.where(mask, jnp.exp(scores - highest), 0.0)
  denominator = jnp.sum(weights, axis=-1, keepdims=True)
  if cache.value_scale is not None:
    weights = weights * _per_row(cache.value_scale, weights)
  weights = weights.astype(q.dtype)
  return SoftmaxPartial(highest, denominator, _weighted_sum(weights, values))


def _weighted_sum(weights: jax.Array, values_BKHS: jax.Array) -> jax.Array:
  """Returns the values of a part, weighted by [B, K, .., S]: float32 [B, K, .., H]."""
  f32 = {"preferred_element_type": jnp.float32}
  if weights.ndim == 3:
    return jnp.einsum("BKS,BKHS->BKH", weights, values_BKHS, **f32)
  # A CPU reads the values faster as the first factor (16 images, windows of 4 codes:
  # 10.5 -> 7.4 ms a forward, jaxlib 0.10.2). Without the barrier the compiler turns
  # the product around.
  sum_BKHR = jnp.einsum("BKHS,BKRS->BKHR", values_BKHS, weights, **f32)
  return jax.lax.optimization_barrier(sum_BKHR).swapaxes(2, 3)


def _per_row(scale_BKS: jax.Array, like: jax.Array) -> jax.Array:
  """Returns scales as [B, K, .., S], of the axes of `like`."""
  return jnp.expand_dims(scale_BKS, tuple(range(2, like.ndim - 1)))


def merge(parts: Sequence[SoftmaxPartial]) -> jax.Array:
  """Merges parts into mixed values [B, K, .., H] (arXiv 2205.14135, section 3.1)."""
  if len(parts) == 1:
    return parts[0].numerator / parts[0].denominator
  highest = functools.reduce(jnp.maximum, [part.max for part in parts])
  scales = [jnp.exp(part.max - highest) for part in parts]
  total = sum(k * part.denominator for k, part in zip(scales, parts, strict=True))
  mixed = sum(k * part.numerator for k, part in zip(scales, parts, strict=True))
  return mixed / total
