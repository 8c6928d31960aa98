"""Two-dimensional rotary position embedding over the grid of codes.

RoPE (arXiv 2104.09864) with the head's frequency pairs split between the two
coordinates of a code: the first half of the pairs turns with the row, the
second with the column.

A pair is (f, f + F) for F = head_dim / 2, that is, the two halves of the head
are the two components. The original keeps a pair in neighbouring channels; the
weights are permuted once on import (`weights`), which changes no attention
logit and spares the TPU a strided shuffle per layer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.gpt.config import GPTConfig


def rope_table(config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns cos and sin, float32 [length, head_dim / 2], one row a position."""
  half = config.head_dim // 2
  exponents = np.arange(0, half, 2, dtype=np.float32) / half
  frequencies = (1.0 / config.rope_base**exponents).astype(np.float32)
  angles = np.outer(np.arange(config.grid, dtype=np.float32), frequencies)
  rows = np.repeat(angles, config.grid, axis=0)
  columns = np.tile(angles, (config.grid, 1))
  image = np.concatenate([rows, columns], axis=1)[:-1]  # last code: no input

  shape = (config.prefix_tokens, half)
  prefix_cos = np.zeros(shape) if config.prefix_rope == "zero" else np.ones(shape)
  cos = np.concatenate([prefix_cos, np.cos(image)])
  sin = np.concatenate([np.zeros(shape), np.sin(image)])
  return cos.astype(np.float32), sin.astype(np.float32)


def apply_rope(x_BTNH: jax.Array, cos_TF: jax.Array, sin_TF: jax.Array) -> jax.Array:
  """Rotates the pairs of every head; float32 inside, dtype of `x` outside.

  The tables may also be [B, T, F], where every row is at positions of its own.
  """
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_TF[..., None, :], sin_TF[..., None, :]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
