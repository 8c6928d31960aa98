"""The transformer with a KV cache: what decoding runs.

Axes: B batch, T tokens, S cache length, D model, K kv heads, H head dim,
V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.layers import Block, Cache, rms_norm
from llamagen_jax.gpt.model import project
from llamagen_jax.gpt.rope import rope_table


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """The same parameters with `layers` as a tuple of per-layer trees.

  This is the form that decoding uses: every layer's weights are arrays of their
  own, so no step slices them out of a stack.
  """
  leaves, structure = jax.tree.flatten(params["layers"])
  layers = tuple(structure.unflatten(rows) for rows in zip(*leaves, strict=True))
  return params | {"layers": layers}


def init_cache(config: GPTConfig, batch: int) -> tuple[Cache, ...]:
  """An empty KV cache: keys and values [B, K, S, H] for every layer."""
  shape = (batch, config.num_kv_heads, config.length, config.head_dim)
  empty = jnp.zeros(shape, config.dtype)
  return tuple((empty, empty) for _ in range(config.layers))


def cached_forward(
  config: GPTConfig,
  params: dict[str, Any],
  x_BTD: jax.Array,
  cache: tuple[Cache, ...],
  position: jax.Array | int,
  mask_BTS: jax.Array,
) -> tuple[jax.Array, tuple[Cache, ...]]:
  """Runs T embedded tokens at `position` .. `position` + T - 1.

  Args:
    config: shape of the model.
    params: unstacked parameters (`unstack_layers`).
    x_BTD: embedded tokens, condition or codes.
    cache: from `init_cache` or the step before.
    position: of the first token; one scalar for the batch.
    mask_BTS: bool [B or 1, T, length], which cache entries a token sees.

  Returns:
    float32 logits [B, V] after the last of the tokens, and the new cache.
  """
  block = Block(config)
  rope = tuple(
    jax.lax.dynamic_slice_in_dim(table, position, x_BTD.shape[1])
    for table in map(jnp.asarray, rope_table(config))
  )
  new_cache = []
  for layer, layer_cache in zip(params["layers"], cache, strict=True):
    x_BTD, layer_cache = block.apply(
      {"params": layer}, x_BTD, 0.0, rope, mask_BTS, layer_cache, position
    )
    new_cache.append(layer_cache)
  last = rms_norm(x_BTD[:, -1:], params["norm"], config.norm_eps)
  return project(last, params["head"])[:, 0], tuple(new_cache)
