"""The decode loop: a prefill of the condition, then a scan over the codes.

Every image has T codes and no end token, so the loop has a fixed length. With
guidance an image is a pair of neighbouring rows (conditional, unconditional):
sharding the batch never separates the two.

The loop is cut into a few scans over a growing cache, because a step reads the
whole cache, and on average half of it is still empty.

Axes: B images, R rows (2 B with guidance, else B), P condition tokens, T codes,
D model, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.gpt.cache import Cache, cache_length, init_cache, resize_cache
from llamagen_jax.gpt.cached import decoding_params, prefill_forward, step_forward
from llamagen_jax.gpt.conditioning import attention_mask, embed_prefix
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes
from llamagen_jax.gpt.sampling_config import (
  ActiveFilters,
  BatchSampling,
  SamplingConfig,
)
from llamagen_jax.sampling.guidance import guide, scale_at
from llamagen_jax.sampling.logits import sample_codes
from llamagen_jax.sampling.order import decoding_order, to_raster
from llamagen_jax.sampling.window import init_state, run_chunk, start_rows

# A program is compiled for every length of the cache: a few, and no tiny ones.
MOST_SEGMENTS = 8
SHORTEST_SEGMENT = 32
FORWARDS = 1  # of a chunk of windows


class DecodeInputs(NamedTuple):
  """Arrays that a decode loop reads and never changes."""

  params: dict[str, Any]  # from `decoding_params`
  keys: jax.Array  # one an image, [B]
  condition_mask: jax.Array | None  # [B, P] or [B, 2, P], 0 on padding of captions
  settings: BatchSampling  # of every image


class DecodeState(NamedTuple):
  """Arrays that a decode loop carries from step to step."""

  code: jax.Array  # the last one of every image, int32 [B]
  index: jax.Array  # number of the next code, int32
  cache: Cache  # of R rows, holds what comes before `code`


def generate(
  config: GPTConfig,
  params: dict[str, Any],
  condition: jax.Array,
  key: jax.Array,
  condition_mask: jax.Array | None = None,
  sampling: SamplingConfig = SamplingConfig(),
) -> jax.Array:
  """Samples the codes of a batch of images.

  Args:
    config: shape of the model.
    params: as trained, or from `decoding_params`, which spares a copy a call.
    condition: labels [B] or caption features [B, P, C]; or pairs of features
      [B, 2, P, C], whose second one guidance leads away from.
    key: one key for the batch, or one an image [B]. With a key of its own, an
      image does not depend on what else is in the batch.
    condition_mask: [B, P] or [B, 2, P], 0 on the padding of captions.
    sampling: guidance, temperature, filters and order, the same for every image.

  Returns:
    int32 codes [B, T] in raster order.
  """
  batch = condition.shape[0]
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)  # from `jax.random.PRNGKey`
  if key.ndim == 0:
    key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  inputs = DecodeInputs(
    decoding_params(config, params), key, condition_mask, sampling.for_batch(batch)
  )
  codes, _ = generate_codes(config, sampling, inputs, condition)
  return codes


def generate_codes(
  config: GPTConfig,
  sampling: SamplingConfig,
  inputs: DecodeInputs,
  condition: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Runs `generate`; its decode loop is one program.

  Returns:
    int32 codes [B, T], and the number of forwards that each image took, int32 [B].
  """
  sampling.check_model(config)
  window, filters = sampling.window, sampling.active_filters
  order_BT = decoding_order(sampling.order, inputs.keys, config.image_tokens)
  if window > 1:
    codes, forwards = decode_windows(
      config, filters, window, inputs, condition, order_BT
    )
    return to_raster(codes, order_BT), forwards
  codes = decode_codes(config, filters, inputs, condition, order_BT)
  forwards = np.full(len(codes), config.image_tokens, np.int32)
  return to_raster(codes, order_BT), forwards


@functools.partial(jax.jit, static_argnames=("config", "filters", "window"))
def decode_windows(
  config: GPTConfig,
  filters: ActiveFilters,
  window: int,
  inputs: DecodeInputs,
  condition: jax.Array,
  order_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Samples windows of codes; returns codes [B, T] and forwards [B], both int32.

  Codes are sampled at, and returned in the order of, the positions `order_BT`; None =
  raster order.

  The cache has its full length from the start, so that an image does not depend on how
  fast its neighbours advance.
  """
  x_RPD, mask_RP = embed_rows(config, filters.guidance, inputs, condition)
  state = init_state(config, len(x_RPD), window, FORWARDS)
  state = start_rows(config, inputs.params, state, x_RPD, mask_RP)
  repeated = inputs._replace(
    keys=jnp.repeat(inputs.keys, window),
    settings=jax.tree.map(lambda x: jnp.repeat(x, window), inputs.settings),
  )
  rows = 2 if filters.guidance else 1
  order_RT = expand_for_guidance(order_BT, filters.guidance)

  def sample(logits_RLV, index_RL):
    index_N = index_RL[::rows].reshape(-1)
    logits = logits_RLV.reshape(-1, rows, window, config.vocab_size).swapaxes(1, 2)
    logits = logits.reshape(-1, config.vocab_size)
    code_N = sample_next_codes(config, filters, repeated, logits, index_N)
    return jnp.repeat(code_N.reshape(-1, window), rows, axis=0)

  def unfinished(state):
    return jnp.any(state.count < config.image_tokens)

  def chunk(state):
    return run_chunk(config, window, FORWARDS, inputs.params, state, sample, order_RT)

  state = jax.lax.while_loop(unfinished, chunk, state)
  codes_RT = state.codes[:, 1 : 1 + config.image_tokens]
  return codes_RT[::rows], state.forwards[::rows]


@functools.partial(jax.jit, static_argnames=("config", "filters"))
def decode_codes(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  condition: jax.Array,
  order_BT: jax.Array | None = None,
) -> jax.Array:
  """Samples one code after the other; returns int32 codes [B, T], as they come.

  Code t lies at position `order_BT[:, t]`; None = raster order.
  """
  ends = cache_segment_ends(config)
  order_RT = expand_for_guidance(order_BT, filters.guidance)
  logits_RV, cache = prefill(config, filters, inputs, condition, ends[0], order_RT)
  index = jnp.int32(0)
  code_B = sample_next_codes(config, filters, inputs, logits_RV, index)
  state, codes = DecodeState(code_B, index + 1, cache), [code_B[None]]
  for end in ends:
    length = config.prefix_tokens + end - 1
    state = state._replace(cache=resize_cache(state.cache, length))
    steps = end - sum(len(segment) for segment in codes)
    state, codes_TB = decode_segment(config, filters, inputs, state, steps, order_RT)
    codes.append(codes_TB)
  return jnp.concatenate(codes).T


def decode_segment(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  state: DecodeState,
  steps: int,
  order_RT: jax.Array | None = None,
) -> tuple[DecodeState, jax.Array]:
  """Samples the next `steps` codes; returns the new state and int32 [steps, B].

  `order_RT` is as of `decode_step`.
  """

  def step(state, _):
    logits_RV, cache = decode_step(config, filters, inputs, state, order_RT)
    code_B = sample_next_codes(config, filters, inputs, logits_RV, state.index)
    return DecodeState(code_B, state.index + 1, cache), code_B

  return jax.lax.scan(step, state, length=steps)


def cache_segment_ends(config: GPTConfig, most: int = MOST_SEGMENTS) -> list[int]:
  """Returns the numbers of codes at which the cache is as long as what is written."""
  count = min(most, max(1, config.image_tokens // SHORTEST_SEGMENT))
  return [config.image_tokens * (i + 1) // count for i in range(count)]


def prefill(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  condition: jax.Array,
  codes: int,
  order_RT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Runs the condition tokens of B images.

  Args:
    config: shape of the model.
    filters: with guidance, every image gets an unconditional row beside its own.
    inputs: of the loop.
    condition: labels [B], caption features [B, P, C] or pairs of them.
    codes: how many the cache is to have room for, the last of them not counted,
      which is sampled and not read.
    order_RT: as of `decode_step`.

  Returns:
    float32 logits [R, V] of the first codes, and the cache.
  """
  length = config.prefix_tokens + codes - 1
  x_RPD, mask_RP = embed_rows(config, filters.guidance, inputs, condition)
  mask = attention_mask(config, mask_RP, jnp.arange(config.prefix_tokens), length)
  cache = init_cache(config, len(x_RPD), length)
  return prefill_forward(config, inputs.params, x_RPD, cache, mask, order_BT=order_RT)


def embed_rows(
  config: GPTConfig, guidance: bool, inputs: DecodeInputs, condition: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Returns embedded condition tokens [R, P, D] and their mask [R, P]."""
  negative = condition.ndim == 4  # with captions to lead away from
  condition = expand_for_guidance(condition, guidance, negative)
  drop_R = (jnp.arange(len(condition)) % 2 == 1) & (guidance and not negative)
  beta_R = None
  if config.guidance_embedding:
    beta_R = expand_for_guidance(inputs.settings.guidance_beta, guidance)
    beta_R = jnp.where(drop_R, 1.0, beta_R)
  x_RPD = embed_prefix(config, inputs.params, condition, drop_R, beta_R)
  return x_RPD, row_mask(inputs, guidance)


def row_mask(inputs: DecodeInputs, guidance: bool) -> jax.Array | None:
  """Returns the condition mask of every row, [R, P]."""
  mask = inputs.condition_mask
  return expand_for_guidance(mask, guidance, mask is not None and mask.ndim == 3)


def decode_step(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  state: DecodeState,
  order_RT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Reads the last codes; returns float32 logits [R, V] of the next, and the cache.

  With `order_RT`, permutations of the codes' positions, code t of a row lies at
  position `order_RT[:, t]`; None = raster order.
  """
  code_R = expand_for_guidance(state.code, filters.guidance)
  position = config.prefix_tokens + state.index - 1
  x_R1D = embed_codes(inputs.params["code_embedding"], code_R[:, None], config.dtype)
  mask_RP, length = row_mask(inputs, filters.guidance), cache_length(state.cache)
  mask = attention_mask(config, mask_RP, position[None], length)
  return step_forward(
    config, inputs.params, x_R1D, state.cache, position, mask, order_BT=order_RT
  )


def sample_next_codes(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  logits_RV: jax.Array,
  index: jax.Array,
) -> jax.Array:
  """Samples codes from their logits, int32 [B].

  Args:
    config: shape of the model.
    filters: stages of sampling that some image needs.
    inputs: keys and settings of the images.
    logits_RV: of the codes, in pairs of rows with guidance.
    index: number of the code; or [B], where every image has its own.
  """
  logits_BV = guided_logits(config, filters, inputs, logits_RV, index)
  keys_B = code_keys(inputs.keys, index)
  return sample_codes(logits_BV, keys_B, inputs.settings, filters)


def guided_logits(
  config: GPTConfig,
  filters: ActiveFilters,
  inputs: DecodeInputs,
  logits_RV: jax.Array,
  index: jax.Array,
) -> jax.Array:
  """Returns the logits that an image's code is sampled from, before filters, [B, V]."""
  if not filters.guidance:
    return logits_RV
  pairs = logits_RV.reshape(-1, 2, config.vocab_size)
  scale_B = scale_at(inputs.settings, index, config.image_tokens)
  return guide(pairs[:, 0], pairs[:, 1], scale_B)


def code_keys(keys_B: jax.Array, index: jax.Array) -> jax.Array:
  """Returns the keys of the codes with this number, or numbers [B], of images."""
  return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(index, keys_B.shape))


def expand_for_guidance(
  x_B: Any, guidance: bool, has_negative_prompt: bool = False
) -> Any:
  """Expands arrays of images [B, ..], or pairs of rows [B, 2, ..], to rows [R, ..]."""
  if x_B is None:
    return None
  if has_negative_prompt:
    return x_B[:, : 2 if guidance else 1].reshape(-1, *x_B.shape[2:])
  return jnp.repeat(x_B, 2, axis=0) if guidance else x_B
