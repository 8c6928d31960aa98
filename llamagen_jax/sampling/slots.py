"""The compiled step of serving: images at different stages in one batch.

A slot is a pair of neighbouring rows: the two halves of an image that is sampled with
guidance, or two images without. Every row has its own condition, position, key and
sampling settings, all of them arrays, so that no mixture of requests compiles
anything. Between chunks of a few forwards rows change hands.

The codes of a row depend on that row alone, and an image starts where a chunk starts:
they are the same, bit for bit, whatever else is in the batch.

Axes: N slots, R = 2 N rows, M rows that images start in, L window, P condition tokens,
C caption features, T codes, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.conditioning import embed_prefix
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import ActiveFilters, BatchSampling
from llamagen_jax.sampling import window as windows
from llamagen_jax.sampling.guidance import guide, scale_at
from llamagen_jax.sampling.keys import as_keys
from llamagen_jax.sampling.logits import sample_codes
from llamagen_jax.sampling.window import WindowState

ACTIVE_FILTERS = ActiveFilters(guidance=True, top_k=True, top_p=True, random=True)


class ChunkInputs(NamedTuple):
  """Arrays that the host sends with a chunk."""

  shared: jax.Array  # whether the second row of a slot has an image of its own, [N]
  keys: jax.Array  # data of keys, uint32 [R, 2]
  settings: BatchSampling  # [R]; plain in idle rows, so that no filter runs for them


class ChunkOutputs(NamedTuple):
  """Arrays that the host reads after a chunk."""

  codes: jax.Array  # of the images in the rows, int32 [R, T]; final up to `count`
  count: jax.Array  # int32 [R]
  forwards: jax.Array  # that these codes took, int32 [R]


class Conditions(NamedTuple):
  """Conditions of some rows, two neighbours an image."""

  condition: jax.Array  # labels [M] or caption features [M, P, C]
  mask: jax.Array | None  # 0 on the padding of captions, [M, P]
  drop: jax.Array  # whether a row gets the unconditional embedding instead, [M]
  beta: jax.Array  # strength of a guidance-free model, [M]


def init_state(
  config: GPTConfig, slots: int, window: int, forwards: int
) -> WindowState:
  """Returns idle slots."""
  return windows.init_state(config, 2 * slots, window, forwards)


def prefill_rows(
  config: GPTConfig,
  params: dict[str, Any],
  state: WindowState,
  row_M: jax.Array,
  conditions: Conditions,
) -> WindowState:
  """Starts images in two rows each.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    state: of all rows.
    row_M: numbers of the rows, int32; a row may be there twice, with one condition.
    conditions: of the rows.
  """
  c, (condition, mask_MP, drop_M, beta_M) = config, conditions
  beta_M = jnp.where(drop_M, 1.0, beta_M) if c.guidance_embedding else None
  x_MPD = embed_prefix(c, params, condition, drop_M, beta_M)
  cache, mask_RP = state.cache, state.mask
  if c.prefix_tokens > 1:
    fresh = init_cache(c, len(x_MPD), c.prefix_tokens)
    prefix = windows.prefill(c, params, fresh, x_MPD[:, :-1], mask_MP)
    cache = jax.tree.map(lambda old, new: _put(old, new, row_M), cache, prefix)
  if mask_RP is not None:
    mask_RP = _put(mask_RP, mask_MP.astype(bool), row_M)
  return state._replace(
    cache=cache,
    prompt=_put(state.prompt, x_MPD[:, -1], row_M),
    mask=mask_RP,
    # Both rows of an image have to start from the same guesses.
    codes=state.codes.at[row_M].set(0),
    count=state.count.at[row_M].set(0),
    forwards=state.forwards.at[row_M].set(0),
  )


def run_chunk(
  config: GPTConfig,
  window: int,
  forwards: int,
  params: dict[str, Any],
  state: WindowState,
  inputs: ChunkInputs,
) -> tuple[WindowState, ChunkOutputs]:
  """Samples the next codes of every row, `forwards` times up to `window` of them."""

  def sample(logits_RLV, index_RL):
    return sample_rows(config, logits_RLV, index_RL, inputs)

  state = windows.run_chunk(config, window, forwards, params, state, sample)
  codes_RT = state.codes[:, 1 : 1 + config.image_tokens]
  return state, ChunkOutputs(codes_RT, state.count, state.forwards)


def sample_rows(
  config: GPTConfig, logits_RLV: jax.Array, index_RL: jax.Array, inputs: ChunkInputs
) -> jax.Array:
  """Samples codes, int32 [R, L]; both rows of a guided image get the same ones."""
  R, L, V = logits_RLV.shape
  logits_N2LV = logits_RLV.reshape(-1, 2, L, V)
  keys_RL = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
    as_keys(inputs.keys), index_RL
  )

  def settings(row: int) -> BatchSampling:
    return jax.tree.map(lambda x: jnp.repeat(x[row::2], L), inputs.settings)

  def sample(logits_MV, row: int):
    keys_M = keys_RL[row::2].reshape(-1)
    return sample_codes(logits_MV, keys_M, settings(row), ACTIVE_FILTERS)

  first_MV, second_MV = (logits_N2LV[:, row].reshape(-1, V) for row in range(2))
  scale_M = scale_at(settings(0), index_RL[::2].reshape(-1), config.image_tokens)
  # Without guidance the scale is 1, and the other row does not count.
  first_M = sample(guide(first_MV, second_MV, scale_M), 0)
  second_M = jax.lax.cond(
    jnp.any(inputs.shared), lambda: sample(second_MV, 1), lambda: first_M
  )
  second_M = jnp.where(jnp.repeat(inputs.shared, L), second_M, first_M)
  return jnp.stack([first_M.reshape(-1, L), second_M.reshape(-1, L)], 1).reshape(R, L)


def _put(old: jax.Array, new_M: jax.Array, row_M: jax.Array) -> jax.Array:
  """Writes rows, from the start of all other axes on."""
  for i in range(len(new_M)):
    start = (row_M[i], *(0,) * (old.ndim - 1))
    old = jax.lax.dynamic_update_slice(old, new_M[i : i + 1].astype(old.dtype), start)
  return old
