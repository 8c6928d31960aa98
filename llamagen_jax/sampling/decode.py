"""The decode loop: a prefill of the condition, then one scan over the codes.

Every picture has T codes and no end token, so the loop has a fixed length. With
guidance a picture is a pair of neighbouring rows (conditional, unconditional):
sharding the batch never separates the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cached import cached_forward, init_cache, unstack_layers
from llamagen_jax.gpt.conditioning import attention_mask, embed_condition
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes
from llamagen_jax.sampling.config import Rows, SamplingConfig, Stages
from llamagen_jax.sampling.guidance import guide, scale_at
from llamagen_jax.sampling.logits import sample_codes


def generate(
  config: GPTConfig,
  params: dict[str, Any],
  condition: jax.Array,
  key: jax.Array,
  condition_mask: jax.Array | None = None,
  sampling: SamplingConfig = SamplingConfig(),
) -> jax.Array:
  """Draws the codes of a batch of pictures.

  Args:
    config: shape of the model.
    params: stacked or unstacked (`unstack_layers`; spares a copy a call).
    condition: labels [B] or caption features [B, P, C].
    key: one key for the batch, or one a picture [B]. With a key of its own, a
      picture does not depend on what else is in the batch.
    condition_mask: [B, P], 0 on the padding of captions.
    sampling: guidance, temperature and filters, the same for every picture.

  Returns:
    int32 codes [B, T] in raster order.
  """
  batch = condition.shape[0]
  if key.ndim == 0:
    key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  if not isinstance(params["layers"], tuple):
    params = unstack_layers(params)
  rows = sampling.rows(batch)
  return _generate(
    config, sampling.stages, params, condition, key, condition_mask, rows
  )


@functools.partial(jax.jit, static_argnames=("config", "stages"))
def _generate(
  config: GPTConfig,
  stages: Stages,
  params: dict[str, Any],
  condition: jax.Array,
  keys_B: jax.Array,
  condition_mask: jax.Array | None,
  rows: Rows,
) -> jax.Array:
  c = config
  copies = 2 if stages.guidance else 1  # rows a picture

  def per_row(x_B):
    return x_B if x_B is None else jnp.repeat(x_B, copies, axis=0)

  def draw(logits, index):
    if stages.guidance:
      pairs = logits.reshape(-1, 2, c.vocab_size)
      scale_B = scale_at(rows, index, c.image_tokens)
      logits = guide(pairs[:, 0], pairs[:, 1], scale_B)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
    return sample_codes(logits, keys, rows, stages)

  row = jnp.arange(copies * condition.shape[0])
  drop = row % copies == 1
  embedder = embed_condition(c)
  x = embedder.apply({"params": params["condition"]}, per_row(condition), drop)
  condition_mask = per_row(condition_mask)
  mask = attention_mask(c, condition_mask, jnp.arange(c.prefix_tokens))
  cache = init_cache(c, len(row))
  logits, cache = cached_forward(c, params, x, cache, 0, mask)
  first_B = draw(logits, jnp.int32(0))

  def step(carry, index):
    code_B, cache = carry
    position = c.prefix_tokens + index - 1
    x = embed_codes(params["code_embedding"], per_row(code_B)[:, None], c.dtype)
    mask = attention_mask(c, condition_mask, position[None])
    logits, cache = cached_forward(c, params, x, cache, position, mask)
    code_B = draw(logits, index)
    return (code_B, cache), code_B

  _, rest_TB = jax.lax.scan(step, (first_B, cache), jnp.arange(1, c.image_tokens))
  return jnp.concatenate([first_B[None], rest_TB]).T
