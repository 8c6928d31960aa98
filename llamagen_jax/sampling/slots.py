"""The compiled step of serving: images at different stages in one batch.

A slot is a pair of neighbouring rows: the two halves of an image that is drawn with
guidance, or two images without. Every row has its own condition, position, key and
sampling settings, all of them arrays, so that no mixture of requests compiles
anything. Between chunks of a few steps rows change hands.

What a row computes depends on that row alone, and an image starts where a chunk
starts: its codes are the same, bit for bit, whatever else is in the batch.

Axes: N slots, R = 2 N rows, C steps of a chunk, P condition tokens, S positions,
D model, V vocabulary, K kv heads, G query heads per kv head, H head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import (
  Cache,
  as_cache,
  cache_length,
  init_cache,
  write_cache,
)
from llamagen_jax.gpt.cached import prefill_forward, run_layers, to_logits
from llamagen_jax.gpt.cached_attention import attend_parts
from llamagen_jax.gpt.conditioning import attention_mask, embed_condition
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes
from llamagen_jax.gpt.sampling_config import ActiveFilters, BatchSampling
from llamagen_jax.sampling.guidance import guide, scale_at
from llamagen_jax.sampling.logits import sample_codes

ACTIVE_FILTERS = ActiveFilters(guidance=True, top_k=True, top_p=True, random=True)


class State(NamedTuple):
  """What stays on the device; every row at a stage of its own."""

  cache: Cache  # of what was read before the chunk
  prompt: jax.Array  # the last condition token, embedded, [R, D]
  mask: jax.Array | None  # False on the padding of captions, [R, P]
  code: jax.Array  # drawn last, int32 [R]


class ChunkInputs(NamedTuple):
  """What the host says of a chunk."""

  index: jax.Array  # number of the code to draw next, [R]; 0 where a row is idle
  shared: jax.Array  # the second row of a slot draws an image of its own, [N]
  keys: jax.Array  # data of keys, uint32 [R, 2]
  rows: (
    BatchSampling  # settings [R]; plain where nothing is drawn, so that no filter runs
  )


def init_state(config: GPTConfig, slots: int) -> State:
  """Idle slots."""
  c, rows = config, 2 * slots
  mask = None
  if c.condition == "caption":
    mask = jnp.zeros((rows, c.prefix_tokens), bool)
  prompt = jnp.zeros((rows, c.dim), c.dtype)
  return State(init_cache(c, rows, c.length), prompt, mask, jnp.zeros(rows, jnp.int32))


def prefill_rows(
  config: GPTConfig,
  params: dict[str, Any],
  state: State,
  row_2: jax.Array,
  condition: jax.Array,
  mask_2P: jax.Array | None,
  drop_2: jax.Array,
) -> State:
  """Puts a condition into two rows, which may be the same one.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    state: of all rows.
    row_2: numbers of the rows.
    condition: labels [2] or caption features [2, P, C].
    mask_2P: 0 on the padding of captions.
    drop_2: whether a row gets the unconditional embedding instead.
  """
  c, before = config, config.prefix_tokens - 1
  embedder = embed_condition(c)
  x_2PD = embedder.apply({"params": params["condition"]}, condition, drop_2)
  cache, mask_RP = state.cache, state.mask
  if before:
    mask = attention_mask(c, mask_2P, jnp.arange(before), c.prefix_tokens)
    fresh = init_cache(c, 2, c.prefix_tokens)
    _, prefix = prefill_forward(c, params, x_2PD[:, :-1], fresh, mask)
    cache = jax.tree.map(lambda old, new: _put(old, new, row_2), cache, prefix)
  if mask_RP is not None:
    mask_RP = _put(mask_RP, mask_2P.astype(bool), row_2)
  prompt_RD = _put(state.prompt, x_2PD[:, -1], row_2)
  return state._replace(cache=cache, prompt=prompt_RD, mask=mask_RP)


def run_chunk(
  config: GPTConfig, steps: int, params: dict[str, Any], state: State, plan: ChunkInputs
) -> tuple[State, jax.Array]:
  """Draws the next `steps` codes of every row; int32 [C, R].

  Keys and values of the chunk go to a small cache of their own, where all rows
  write to the same place, and to their places in the large one at the end.
  """
  c = config
  start_R = c.prefix_tokens - 1 + plan.index

  def step(carry, number):
    recent, code_R = carry
    index_R = plan.index + number
    codes_RD = embed_codes(params["code_embedding"], code_R, c.dtype)
    x_RD = jnp.where((index_R == 0)[:, None], state.prompt, codes_RD)
    logits_RV, recent = _forward(c, params, x_RD, state, recent, start_R, number)
    code_R = sample_rows(c, logits_RV, index_R, plan)
    return (recent, code_R), code_R

  recent = init_cache(c, len(start_R), steps)
  (recent, code_R), codes_CR = jax.lax.scan(
    step, (recent, state.code), jnp.arange(steps)
  )
  put_each = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2))
  cache = jax.tree.map(
    lambda old, new: put_each(old, new, start_R), state.cache, recent
  )
  return state._replace(cache=cache, code=code_R), codes_CR


def _forward(
  config, params, x_RD, state: State, recent: Cache, start_R, number
) -> tuple[jax.Array, Cache]:
  """Step `number` of a chunk: logits [R, V], and `recent` with its keys and values."""
  c, steps = config, cache_length(recent)
  position_R1 = (start_R + number)[:, None]
  mask_R1S = attention_mask(c, state.mask, position_R1)
  at_RC = jnp.minimum(start_R[:, None] + jnp.arange(steps), c.length - 1)
  recent_R1C = jnp.take_along_axis(mask_R1S, at_RC[:, None], axis=2)
  recent_R1C &= jnp.arange(steps) <= number
  mask_R1S &= (jnp.arange(c.length) < start_R[:, None])[:, None]

  def attend(q_R1KGH, k_R1KH, v_R1KH, caches):
    before, old = caches
    new = write_cache(old, as_cache(k_R1KH, v_R1KH), number)
    parts = [(before, mask_R1S), (new, recent_R1C)]
    return attend_parts(q_R1KGH, parts), new

  caches = tuple(zip(state.cache, recent, strict=True))
  x_R1D = x_RD[:, None]
  x_R1D, recent = run_layers(c, params, x_R1D, position_R1, caches, attend)
  return to_logits(c, params, x_R1D[:, 0]), recent


def sample_rows(config: GPTConfig, logits_RV, index_R, plan: ChunkInputs) -> jax.Array:
  """Logits -> codes, int32 [R]; both rows of a guided image get the same one."""
  keys_R = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(plan.keys), index_R)
  logits_N2V = logits_RV.reshape(-1, 2, config.vocab_size)
  scale_N = scale_at(plan.rows, index_R, config.image_tokens)[::2]

  def draw(logits_NV, row: int):
    rows = jax.tree.map(lambda x: x[row::2], plan.rows)
    return sample_codes(logits_NV, keys_R[row::2], rows, ACTIVE_FILTERS)

  # Without guidance the scale is 1, and the other row does not count.
  first_N = draw(guide(logits_N2V[:, 0], logits_N2V[:, 1], scale_N), 0)
  second_N = jax.lax.cond(
    jnp.any(plan.shared), lambda: draw(logits_N2V[:, 1], 1), lambda: first_N
  )
  second_N = jnp.where(plan.shared, second_N, first_N)
  return jnp.stack([first_N, second_N], axis=1).reshape(-1)


def _put(old: jax.Array, new_2: jax.Array, row_2: jax.Array) -> jax.Array:
  """Writes two rows, from the start of all other axes on."""
  for i in range(2):
    start = (row_2[i], *(0,) * (old.ndim - 1))
    old = jax.lax.dynamic_update_slice(old, new_2[i : i + 1].astype(old.dtype), start)
  return old
