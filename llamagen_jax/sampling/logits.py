"""From logits to codes: temperature, top-k, top-p, sample. Every row on its own.

Both filters keep what lies at or above a threshold, and find the threshold by
bisection on the bits of a float32: 32 passes that compare and sum. No sort, k
and p may differ from row to row, and a vocabulary that is sharded over chips
costs one small all-reduce a pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.sampling_config import ActiveFilters, BatchSampling


def sample_codes(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  settings: BatchSampling,
  filters: ActiveFilters,
) -> jax.Array:
  """Samples one code a row from float32 logits; int32 [B]."""
  best_B = _argmax(logits_BV)
  if not filters.random:
    return best_B
  logits_BV = logits_BV / settings.temperature[:, None]
  if filters.top_k:
    logits_BV = _if_any(settings.top_k > 0, keep_top_k, logits_BV, settings.top_k)
  if filters.top_p:
    logits_BV = _if_any(settings.top_p < 1, keep_top_p, logits_BV, settings.top_p)
  noise_BV = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape))(
    keys_B, logits_BV
  )
  sampled_B = _argmax(logits_BV + noise_BV)
  return jnp.where(settings.greedy, best_B, sampled_B)


def _argmax(x_BV: jax.Array) -> jax.Array:
  """Returns the index of the first maximum, int32 [B].

  Two plain reductions, which a CPU does in vectors, where `jnp.argmax` goes number by
  number, and makes the noise on the way as slowly.
  """
  last = x_BV.shape[-1] - 1  # a row of NaN has no maximum
  is_highest = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(is_highest, jnp.arange(last + 1), last), axis=-1)


def _if_any(asked_B, keep, logits_BV, setting_B) -> jax.Array:
  """Filters, unless no row asks for it: mixed batches pay for the filters they use."""
  return jax.lax.cond(
    jnp.any(asked_B), keep, lambda logits_BV, _: logits_BV, logits_BV, setting_B
  )


def keep_top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
  """Sets all but the k largest logits of a row to -inf; k = 0 keeps all.

  Ties with the k-th largest are kept.
  """
  order_BV = _ordered_bits(logits_BV)

  def enough(threshold_B):
    return jnp.sum(order_BV >= threshold_B[:, None], axis=1) >= k_B

  threshold_B = jnp.where(k_B > 0, _largest(enough, k_B.shape), 0)
  return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Sets logits outside the nucleus (arXiv 1904.09751) to -inf; p = 1 keeps all.

  A code stays if the codes more probable than it hold a mass of at most p, so
  the most probable one always stays.
  """
  order_BV = _ordered_bits(logits_BV)
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)

  def too_much(threshold_B):
    above = order_BV >= threshold_B[:, None]
    return jnp.sum(jnp.where(above, probs_BV, 0.0), axis=1) > p_B

  threshold_B = jnp.where(p_B < 1, _largest(too_much, p_B.shape), 0)
  return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
  """Maps float32 to uint32 with the same order."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[jax.Array], jax.Array], shape) -> jax.Array:
  """Returns the largest uint32 [B] for which a monotone predicate holds, else 0."""

  def try_bit(i, threshold_B):
    candidate_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(holds(candidate_B), candidate_B, threshold_B)

  return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(shape, jnp.uint32))
