"""Two-dimensional rotary position embedding over the grid of codes.

RoPE (arXiv 2104.09864) with the head's frequency pairs split between the two
coordinates of a code: the first half of the pairs turns with the row, the
second with the column.

A pair is (f, f + F) for F = head_dim / 2, that is, the two halves of the head
are the two components. The original keeps a pair in neighbouring channels; the
weights are permuted once on import (`weights/gpt.py`, `_pack_qkv`), which changes no
attention logit and spares the TPU a strided shuffle per layer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.gpt.config import GPTConfig


def rope_grid(config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns cos and sin, float32 [T, head_dim / 2], one row for every code."""
  half = config.head_dim // 2
  exponents = np.arange(0, half, 2, dtype=np.float32) / half
  frequencies = (1.0 / config.rope_base**exponents).astype(np.float32)
  at_2T = np.indices(config.grid_hw, dtype=np.float32).reshape(2, -1)
  image = np.concatenate([np.outer(at_T, frequencies) for at_T in at_2T], axis=1)
  return np.cos(image), np.sin(image)


def rope_table(config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns cos and sin, float32 [length, head_dim / 2], one row a position."""
  cos, sin = rope_grid(config)
  prefix_cos, prefix_sin = _prefix(config)
  # The last code is no input.
  cos = np.concatenate([prefix_cos, cos[:-1]])
  sin = np.concatenate([prefix_sin, sin[:-1]])
  return cos.astype(np.float32), sin.astype(np.float32)


def rope_in_order(
  config: GPTConfig, order_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin, [B, length, head_dim / 2], of codes in an order of their own.

  Args:
    config: of the model.
    order_BT: a permutation of the codes' positions in every row.
  """
  tables = []
  for prefix_PF, grid_TF in zip(_prefix(config), rope_grid(config), strict=True):
    prefix_BPF = jnp.broadcast_to(prefix_PF, (order_BT.shape[0], *prefix_PF.shape))
    codes_BTF = jnp.asarray(grid_TF)[order_BT[:, :-1]]
    tables.append(jnp.concatenate([prefix_BPF, codes_BTF], axis=1))
  return tuple(table.astype(jnp.float32) for table in tables)


def _prefix(config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns cos and sin of the condition's tokens, [P, head_dim / 2]."""
  shape = (config.prefix_tokens, config.head_dim // 2)
  cos = np.zeros(shape) if config.prefix_rope == "zero" else np.ones(shape)
  return cos, np.zeros(shape)


def apply_rope(x_BTNH: jax.Array, cos_TF: jax.Array, sin_TF: jax.Array) -> jax.Array:
  """Rotates the pairs of every head; float32 inside, dtype of `x` outside.

  The tables may also be [B, T, F], where every row is at positions of its own.
  """
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_TF[..., None, :], sin_TF[..., None, :]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
