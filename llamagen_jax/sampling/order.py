"""Decoding orders: the positions at which the codes of an image are sampled, in turn.

A model with a target embedding was trained in random orders: with a code it reads the
position of the next one (RAR, arXiv 2411.00776), and can decode in any order.

Axes: B images, T codes.
"""

import functools

import jax
import jax.numpy as jnp

NUMBER = 2**31 - 1  # folded into an image's key for its order; codes have 0 .. T - 1


def decoding_order(
  order: str, keys_B: jax.Array, tokens: int, known_BT: jax.Array | None = None
) -> jax.Array | None:
  """Returns the codes' positions in the order of decoding.

  A random order depends on the image's key alone, not on the batch.

  Args:
    order: one of `ORDERS`.
    keys_B: of the images.
    tokens: codes of an image.
    known_BT: bool, codes that are given, which come first in all orders but raster.

  Returns:
    int32 [B, T], a permutation a row; None = raster order.
  """
  if order == "raster" or (order == "known-first" and known_BT is None):
    return None
  return _permutations(order, tokens, keys_B, known_BT)


@functools.partial(jax.jit, static_argnames=("order", "tokens"))
def _permutations(order, tokens, keys_B, known_BT) -> jax.Array:
  def permuted(key):
    return jax.random.permutation(jax.random.fold_in(key, NUMBER), tokens)

  if order == "random":
    order_BT = jax.vmap(permuted)(keys_B)
  else:
    order_BT = jnp.broadcast_to(jnp.arange(tokens), (len(keys_B), tokens))
  if known_BT is None:
    return order_BT
  is_unknown_BT = ~jnp.take_along_axis(known_BT, order_BT, axis=1)
  known_first_BT = jnp.argsort(is_unknown_BT, axis=1, stable=True)
  return jnp.take_along_axis(order_BT, known_first_BT, axis=1)


def to_raster(codes_BT: jax.Array, order_BT: jax.Array | None) -> jax.Array:
  """Returns codes [B, T] that are in the order of decoding in raster order."""
  if order_BT is None:
    return codes_BT
  return jnp.take_along_axis(codes_BT, jnp.argsort(order_BT, axis=1), axis=1)
