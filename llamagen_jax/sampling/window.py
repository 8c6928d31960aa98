"""Windowed decoding: several codes a forward, the same codes as one by one.

Code t is the argmax of filtered, guided logits plus a noise that depends on (key, t)
alone. So there is one sequence in which every code is the argmax given those before
it, and a parallel iteration that stops where it is consistent finds the same sequence
(predictive sampling, arXiv 2002.09928). A forward reads the last final code and L - 1
guesses of the codes after it, and gives L new codes. The first of them is final; so is
each next one as long as the guess before it was right. The others are the guesses of
the next forward.

A row advances by 1 .. L codes a forward, whatever the other rows do. A wrong guess
costs time and changes no code; but a forward of L tokens and one of a single token may
round differently, so that windows of different sizes can break a tie differently.

Keys and values of a few forwards, a chunk, go to a small cache of their own, where all
rows write at the same position; at the end of the chunk those of the final codes are
moved to the large one.

Axes: R rows, F forwards of a chunk, L window, E = F L entries of the chunk's cache,
P condition tokens, T codes, S positions of the large cache, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import (
  Cache,
  as_code_cache,
  cache_length,
  init_cache,
  init_chunk_cache,
  write_cache,
  write_chunk,
)
from llamagen_jax.gpt.cached import prefill_forward, run_layers, to_logits
from llamagen_jax.gpt.cached_attention import attend_beside_chunk
from llamagen_jax.gpt.conditioning import attention_mask
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes

WRONG = jnp.iinfo(jnp.int32).max  # position of a token that was a wrong guess

# (logits [R, L, V], numbers of the codes [R, L]) -> codes int32 [R, L]
Sample = Callable[[jax.Array, jax.Array], jax.Array]


class WindowState(NamedTuple):
  """Arrays that windowed decoding carries; every row is at a position of its own."""

  cache: Cache  # of the tokens before the last final code
  prompt: jax.Array  # the last condition token, embedded, [R, D]
  mask: jax.Array | None  # False on the padding of captions, [R, P]
  codes: jax.Array  # int32 [R, 1 + T + 2 L]; code t at t + 1, guesses from `count` on
  count: jax.Array  # codes that are final, int32 [R]; T where a row is idle
  forwards: jax.Array  # forwards that these codes took, int32 [R]


def init_state(config: GPTConfig, rows: int, window: int, forwards: int) -> WindowState:
  """Returns idle rows for chunks of `forwards` forwards of a window."""
  c, mask = config, None
  if c.condition == "caption":
    mask = jnp.zeros((rows, c.prefix_tokens), bool)
  # A chunk writes all its entries, wherever in the image a row is.
  cache = init_cache(c, rows, c.length + window * forwards)
  prompt = jnp.zeros((rows, c.dim), c.dtype)
  codes = jnp.zeros((rows, 1 + c.image_tokens + 2 * window), jnp.int32)
  count = jnp.full(rows, c.image_tokens, jnp.int32)
  return WindowState(cache, prompt, mask, codes, count, jnp.zeros(rows, jnp.int32))


def start_rows(
  config: GPTConfig,
  params: dict[str, Any],
  state: WindowState,
  x_RPD: jax.Array,
  mask_RP: jax.Array | None,
) -> WindowState:
  """Starts an image in every row, from its embedded condition tokens and their mask."""
  cache, before = state.cache, config.prefix_tokens - 1
  if before:
    cache = prefill(config, params, cache, x_RPD[:, :-1], mask_RP)
  start = jnp.zeros_like(state.count)
  mask = None if mask_RP is None else mask_RP.astype(bool)
  return state._replace(
    cache=cache, prompt=x_RPD[:, -1], mask=mask, count=start, forwards=start
  )


def prefill(
  config: GPTConfig,
  params: dict[str, Any],
  cache: Cache,
  x_RTD: jax.Array,
  mask_RP: jax.Array | None,
) -> Cache:
  """Writes all condition tokens but the last, T = P - 1, to the start of a cache."""
  at_T, length = jnp.arange(x_RTD.shape[1]), cache_length(cache)
  mask = attention_mask(config, mask_RP, at_T, length)
  _, cache = prefill_forward(config, params, x_RTD, cache, mask)
  return cache


def run_chunk(
  config: GPTConfig,
  window: int,
  forwards: int,
  params: dict[str, Any],
  state: WindowState,
  sample: Sample,
  order_RT: jax.Array | None = None,
) -> WindowState:
  """Samples up to `forwards` x `window` more codes of every row.

  Args:
    config: shape of the model.
    window: tokens of a forward; 1 = one code after the other.
    forwards: of the chunk.
    params: from `decoding_params`.
    state: of all rows.
    sample: logits to codes; pairs of guided rows must get the same ones.
    order_RT: positions of the codes, in the order of decoding; None = raster order.
  """
  c, rows = config, len(state.count)
  start_R = c.prefix_tokens - 1 + state.count
  written_R = jnp.where(start_R < c.length, start_R, 0)  # complete rows need not read

  def forward(carry, number):
    state, recent, position_RE = carry
    own_RL = c.prefix_tokens - 1 + state.count[:, None] + jnp.arange(window)
    at = (0, number * window)
    position_RE = jax.lax.dynamic_update_slice(position_RE, own_RL, at)
    logits_RLV, recent = _forward(
      c, params, state, recent, number * window, written_R, own_RL, position_RE,
      order_RT,
    )  # fmt: skip
    index_RL = jnp.minimum(own_RL + 1 - c.prefix_tokens, c.image_tokens - 1)
    codes_RL = sample(logits_RLV, index_RL)
    state, final_R = accept(c, state, codes_RL)
    is_final_RL = jnp.arange(window) < final_R[:, None]
    own_RL = jnp.where(is_final_RL, own_RL, WRONG)
    position_RE = jax.lax.dynamic_update_slice(position_RE, own_RL, at)
    return (state, recent, position_RE), None

  recent = init_chunk_cache(c, rows, forwards * window)
  position_RE = jnp.full((rows, forwards * window), WRONG, jnp.int32)
  (state, recent, position_RE), _ = jax.lax.scan(
    forward, (state, recent, position_RE), jnp.arange(forwards)
  )
  if window > 1:
    # A single forward's entries are in order. But were they not sorted, a CPU would
    # write them before it has read the caches, and copy these (0.56 -> 0.93 ms a
    # forward of one image, jaxlib 0.10.2).
    recent = _final_first(recent, position_RE)
  layers = zip(state.cache, recent, strict=True)
  cache = tuple(write_chunk(old, new, start_R) for old, new in layers)
  return state._replace(cache=cache)


def _forward(
  config: GPTConfig,
  params: dict[str, Any],
  state: WindowState,
  recent: Cache,
  entry: jax.Array,
  written_R: jax.Array,
  own_RL: jax.Array,
  position_RE: jax.Array,
  order_RT: jax.Array | None,
) -> tuple[jax.Array, Cache]:
  """Reads a window; returns logits [R, L, V] and `recent` with its keys and values.

  Nine parameters, because all of them are arrays of the loop: `entry` is the first of
  the window in `recent`, `order_RT` as of `run_chunk`, the rest as for `chunk_masks`.
  """
  c = config
  window = own_RL.shape[1]
  read_RL = _slice_rows(state.codes, state.count, window)
  x_RLD = embed_codes(params["code_embedding"], read_RL, c.dtype)
  is_first = (state.count == 0)[:, None]
  x_RLD = x_RLD.at[:, 0].set(jnp.where(is_first, state.prompt, x_RLD[:, 0]))
  cache_R1S, recent_RLE = chunk_masks(
    state.mask, written_R, own_RL, position_RE, cache_length(state.cache)
  )
  is_condition_RL = own_RL < c.prefix_tokens

  def attend(q_RLKGH, k_RLKH, v_RLKH, caches):
    before, old = caches
    new = write_cache(old, as_code_cache(c, k_RLKH, v_RLKH, is_condition_RL), entry)
    chunk, shortest = (new, recent_RLE), c.prefix_tokens - 1
    return attend_beside_chunk(q_RLKGH, before, cache_R1S, chunk, shortest), new

  caches = tuple(zip(state.cache, recent, strict=True))
  position_RL = jnp.minimum(own_RL, c.length - 1)  # beyond the image nothing counts
  x_RLD, recent = run_layers(
    c, params, x_RLD, position_RL, caches, attend, order_BT=order_RT
  )
  logits_MV = to_logits(c, params, x_RLD.reshape(-1, c.dim))
  return logits_MV.reshape(*read_RL.shape, -1), recent


def chunk_masks(
  mask_RP: jax.Array | None,
  written_R: jax.Array,
  own_RL: jax.Array,
  position_RE: jax.Array,
  length: int,
) -> tuple[jax.Array, jax.Array]:
  """Makes the masks of a forward over the large cache and over that of the chunk.

  A row whose chunk started at position 5, in its third forward of a window of 3, at
  position 8, because the first forward made 2 codes final and the second 1; `#` is
  seen, `.` is not:

      large cache, by position         | cache of the chunk, by entry
      0 1 2 3 4 | 5 6 7 ..             | forward 0  | forward 1  | forward 2
      (written) | (of chunks to come)  | 5 6 wrong  | 7 wr. wr.  | 8 9 10
      # # # # # | . . .                | # #   .    | #  .   .   | # .  .    token at 8
      # # # # # | . . .                | # #   .    | #  .   .   | # #  .    token at 9
      # # # # # | . . .                | # #   .    | #  .   .   | # #  #    token at 10

  The padding of a caption is hidden from every token but itself.

  Args:
    mask_RP: False on the padding of captions; None = there is none.
    written_R: positions before the chunk of a row; 0 where nothing is to be read.
    own_RL: positions of the tokens of this forward.
    position_RE: positions of the entries of the chunk; WRONG hides one.
    length: of the large cache.

  Returns:
    bool [R, 1, S] and [R, L, E].
  """
  key_S = jnp.arange(length)
  cache_RS = key_S < written_R[:, None]
  key_R1E, query_RL1 = position_RE[:, None], own_RL[..., None]
  recent_RLE = key_R1E <= query_RL1
  if mask_RP is not None:
    P = mask_RP.shape[1]
    padded = ((0, 0), (0, length - P))
    cache_RS &= jnp.pad(mask_RP, padded, constant_values=True)
    # Of the condition only its last token is ever in a chunk.
    hidden_R1E = (key_R1E == P - 1) & ~mask_RP[:, -1:, None]
    recent_RLE &= ~hidden_R1E | (key_R1E == query_RL1)
  return cache_RS[:, None], recent_RLE


def accept(
  config: GPTConfig, state: WindowState, codes_RL: jax.Array
) -> tuple[WindowState, jax.Array]:
  """Takes the codes of a forward over, as final ones or as guesses.

  Returns:
    The new state, and how many codes became final, int32 [R]; 0 in idle rows.
  """
  window, T = codes_RL.shape[1], config.image_tokens
  read_RL = _slice_rows(state.codes, state.count, window)
  right_RL = read_RL[:, 1:] == codes_RL[:, :-1]
  final_R = 1 + jnp.sum(jnp.cumprod(right_RL, axis=1, dtype=jnp.int32), axis=1)
  final_R = jnp.minimum(final_R, T - state.count)
  guess_RL = _guess(codes_RL)
  new_R2L = jnp.concatenate([codes_RL, guess_RL], axis=1)
  put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
  kept_R1 = (final_R > 0)[:, None]
  codes = jnp.where(kept_R1, put(state.codes, new_R2L, state.count + 1, 0), state.codes)
  count = state.count + final_R
  forwards = state.forwards + (final_R > 0)
  return state._replace(codes=codes, count=count, forwards=forwards), final_R


def _guess(codes_RL: jax.Array) -> jax.Array:
  """Guesses the codes after a window: the last one again."""
  return jnp.broadcast_to(codes_RL[:, -1:], codes_RL.shape)


def _slice_rows(x_RN: jax.Array, start_R: jax.Array, size: int) -> jax.Array:
  """Returns `size` entries of every row, from its own start on."""
  cut = jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None, None))
  return cut(x_RN, start_R, size, 0)


def _final_first(recent: Cache, position_RE: jax.Array) -> Cache:
  """Sorts the entries of a chunk by position, so that wrong guesses come last."""
  order_RE = jnp.argsort(position_RE, axis=1)

  def sort(x):
    order = jnp.expand_dims(order_RE, tuple(range(1, x.ndim - 1)))
    return jnp.take_along_axis(x, order, axis=-1)

  return jax.tree.map(sort, recent)
