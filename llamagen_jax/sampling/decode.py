"""The decode loop: a prefill of the condition, then a scan over the codes.

Every image has T codes and no end token, so the loop has a fixed length. With
guidance an image is a pair of neighbouring rows (conditional, unconditional):
sharding the batch never separates the two.

The loop is cut into a few scans over a growing cache, because a step reads the
whole cache, and on average half of it is still empty.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cached import (
  Cache,
  cache_length,
  cached_forward,
  decoding_params,
  grow_cache,
  init_cache,
)
from llamagen_jax.gpt.conditioning import attention_mask, embed_condition
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes
from llamagen_jax.gpt.sampling_config import (
  ActiveFilters,
  BatchSampling,
  SamplingConfig,
)
from llamagen_jax.sampling.guidance import guide, scale_at
from llamagen_jax.sampling.logits import sample_codes

# A program is compiled for every length of the cache: a few, and no tiny ones.
MOST_SEGMENTS = 8
SHORTEST_SEGMENT = 32


def generate(
  config: GPTConfig,
  params: dict[str, Any],
  condition: jax.Array,
  key: jax.Array,
  condition_mask: jax.Array | None = None,
  sampling: SamplingConfig = SamplingConfig(),
) -> jax.Array:
  """Draws the codes of a batch of images.

  Args:
    config: shape of the model.
    params: as trained, or from `decoding_params`, which spares a copy a call.
    condition: labels [B] or caption features [B, P, C]; or pairs of features
      [B, 2, P, C], whose second one guidance leads away from.
    key: one key for the batch, or one an image [B]. With a key of its own, an
      image does not depend on what else is in the batch.
    condition_mask: [B, P] or [B, 2, P], 0 on the padding of captions.
    sampling: guidance, temperature and filters, the same for every image.

  Returns:
    int32 codes [B, T] in raster order.
  """
  batch = condition.shape[0]
  if key.ndim == 0:
    key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  params = decoding_params(config, params)
  rows = sampling.rows(batch)
  return generate_codes(
    config, sampling.stages, params, condition, key, condition_mask, rows
  )


@functools.partial(jax.jit, static_argnames=("config", "stages"))
def generate_codes(
  config: GPTConfig,
  stages: ActiveFilters,
  params: dict[str, Any],
  condition: jax.Array,
  keys_B: jax.Array,
  condition_mask: jax.Array | None,
  rows: BatchSampling,
) -> jax.Array:
  """`generate`, compiled: `params` from `decoding_params`, `rows` of settings."""
  c = config
  ends = cache_segment_ends(c)
  logits, cache = prefill(
    c, params, condition, condition_mask, stages.guidance, c.prefix_tokens + ends[0] - 1
  )
  code_B = sample_next_codes(c, stages, logits, jnp.int32(0), keys_B, rows)
  drawn, start = [code_B[None]], 1
  for end in ends:
    cache = grow_cache(cache, c.prefix_tokens + end - 1)
    codes_TB, cache = decode_segment(
      c, stages, params, code_B, start, end, cache, keys_B, condition_mask, rows
    )
    drawn.append(codes_TB)
    code_B, start = codes_TB[-1], end
  return jnp.concatenate(drawn).T


def decode_segment(
  config: GPTConfig,
  stages: ActiveFilters,
  params: dict[str, Any],
  code_B: jax.Array,
  start: int,
  end: int,
  cache: Cache,
  keys_B: jax.Array,
  condition_mask: jax.Array | None,
  rows: BatchSampling,
) -> tuple[jax.Array, Cache]:
  """Draws codes number `start` .. `end` - 1 after `code_B`; int32 [end - start, B]."""

  def step(carry, index):
    code_B, cache = carry
    logits, cache = decode_step(
      config, params, code_B, index, cache, condition_mask, stages.guidance
    )
    code_B = sample_next_codes(config, stages, logits, index, keys_B, rows)
    return (code_B, cache), code_B

  indices = jnp.arange(start, end)
  (_, cache), codes_TB = jax.lax.scan(step, (code_B, cache), indices)
  return codes_TB, cache


def cache_segment_ends(config: GPTConfig) -> list[int]:
  """The numbers of codes at which the cache is as long as what was written."""
  count = min(MOST_SEGMENTS, max(1, config.image_tokens // SHORTEST_SEGMENT))
  return [config.image_tokens * (i + 1) // count for i in range(count)]


def prefill(
  config: GPTConfig,
  params: dict[str, Any],
  condition: jax.Array,
  condition_mask: jax.Array | None,
  guidance: bool,
  length: int,
) -> tuple[jax.Array, Cache]:
  """Runs the condition tokens of B images.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    condition: labels [B], caption features [B, P, C] or pairs of them.
    condition_mask: [B, P] or [B, 2, P], 0 on the padding of captions.
    guidance: whether every image gets an unconditional row beside its own.
    length: of the cache to make.

  Returns:
    float32 logits [R, V] of the first codes and the cache, R = 2B or B rows.
  """
  has_negative_prompt = condition.ndim == 4  # with negative captions of their own
  condition = expand_for_guidance(condition, guidance, has_negative_prompt)
  mask = expand_for_guidance(condition_mask, guidance, has_negative_prompt)
  drop = (jnp.arange(len(condition)) % 2 == 1) & (guidance and not has_negative_prompt)
  embedder = embed_condition(config)
  x = embedder.apply({"params": params["condition"]}, condition, drop)
  mask = attention_mask(config, mask, jnp.arange(config.prefix_tokens), length)
  cache = init_cache(config, len(condition), length)
  return cached_forward(config, params, x, cache, 0, mask)


def decode_step(
  config: GPTConfig,
  params: dict[str, Any],
  code_B: jax.Array,
  index: jax.Array,
  cache: Cache,
  condition_mask: jax.Array | None,
  guidance: bool,
) -> tuple[jax.Array, Cache]:
  """Reads the codes drawn last and gives the logits of the next.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    code_B: codes number `index` - 1 of B images.
    index: number of the code to draw.
    cache: of R rows, from `prefill` or the step before.
    condition_mask: [B, P] or [B, 2, P], 0 on the padding of captions.
    guidance: whether every image has two rows.

  Returns:
    float32 logits [R, V], and the new cache.
  """
  code_R, position = (
    expand_for_guidance(code_B, guidance),
    config.prefix_tokens + index - 1,
  )
  has_negative_prompt = condition_mask is not None and condition_mask.ndim == 3
  x = embed_codes(params["code_embedding"], code_R[:, None], config.dtype)
  mask = attention_mask(
    config,
    expand_for_guidance(condition_mask, guidance, has_negative_prompt),
    position[None],
    cache_length(cache),
  )
  return cached_forward(config, params, x, cache, position, mask)


def sample_next_codes(
  config: GPTConfig,
  stages: ActiveFilters,
  logits_RV: jax.Array,
  index: jax.Array,
  keys_B: jax.Array,
  rows: BatchSampling,
) -> jax.Array:
  """Logits of code number `index` -> the codes, int32 [B]."""
  if stages.guidance:
    pairs = logits_RV.reshape(-1, 2, config.vocab_size)
    scale_B = scale_at(rows, index, config.image_tokens)
    logits_RV = guide(pairs[:, 0], pairs[:, 1], scale_B)
  fold = jax.vmap(jax.random.fold_in, (0, None))
  return sample_codes(logits_RV, fold(keys_B, index), rows, stages)


def expand_for_guidance(
  x_B, guidance: bool, has_negative_prompt: bool = False
) -> jax.Array | None:
  """What belongs to images [B, ..] or pairs of rows [B, 2, ..] -> rows [R, ..]."""
  if x_B is None:
    return None
  if has_negative_prompt:
    return x_B[:, : 2 if guidance else 1].reshape(-1, *x_B.shape[2:])
  return jnp.repeat(x_B, 2, axis=0) if guidance else x_B
