"""Sampling around known codes: some codes of an image are given, the rest is drawn.

A model of raster order draws a code given those before it, and knows nothing of the
given codes that follow. Sequential Monte Carlo makes up for that: N candidates of an
image are drawn at once, each takes the known codes as they are, and its weight is the
product of the probabilities that the model gave them. After a row of codes the
candidates are resampled by weight where few of them carry most of it, and one of the
last ones is returned, chosen by weight. The larger N, the closer is its distribution to
the model's own given all known codes, before and after (Doucet and Johansen, "A
tutorial on particle filtering and smoothing", 2009, section 3).

A model of any order needs none of that: the known codes come first in its order.

Axes: B images, N candidates, M = B N, R rows (2 M with guidance, else M), T codes in
the order of decoding, V vocabulary.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cache import resize_cache
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import ActiveFilters, SamplingConfig
from llamagen_jax.sampling.decode import (
  DecodeInputs,
  DecodeState,
  cache_segment_ends,
  code_keys,
  decode_step,
  expand_for_guidance,
  generate_codes,
  guided_logits,
  prefill,
)
from llamagen_jax.sampling.logits import sample_codes
from llamagen_jax.sampling.order import decoding_order, to_raster

CANDIDATES = 16
FEW = 0.5  # share of the candidates below which they are resampled


@dataclasses.dataclass(frozen=True)
class KnownCodes:
  """Codes of images of which some are known, and how the others are drawn."""

  codes: np.ndarray  # int32 [B, T] in raster order
  known: np.ndarray  # bool [B, T]
  candidates: int = CANDIDATES  # of an image, in raster order

  def __post_init__(self):
    if self.candidates < 1:
      raise UserError(f"candidates={self.candidates}: expected 1 or more")

  def take(self, indices: np.ndarray) -> "KnownCodes":
    """Returns those of some images."""
    return dataclasses.replace(
      self, codes=self.codes[indices], known=self.known[indices]
    )


class Candidates(NamedTuple):
  """Arrays of the loop, of M candidates of B images."""

  state: DecodeState  # of M images
  codes: jax.Array  # so far, int32 [M, T]
  log_weight: jax.Array  # since the last resampling, float32 [M]


class Problem(NamedTuple):
  """Arrays that the loop reads and never changes."""

  inputs: DecodeInputs  # of M candidates
  keys: jax.Array  # of the images, [B]
  given: jax.Array  # codes in the order of decoding, int32 [B, T]
  known: jax.Array  # which of them count, bool [B, T]
  order: jax.Array | None  # positions of the codes of M candidates, int32 [M, T]


def complete_codes(
  config: GPTConfig,
  sampling: SamplingConfig,
  inputs: DecodeInputs,
  condition: jax.Array,
  given: KnownCodes,
) -> tuple[jax.Array, np.ndarray]:
  """Draws the codes that are not known.

  Args:
    config: shape of the model.
    sampling: the same for every image; a window has no effect. In another order than
      raster the known codes come first.
    inputs: of `generate_codes`.
    condition: labels [B], caption features [B, P, C] or pairs of them.
    given: the known codes of every image.

  Returns:
    int32 codes [B, T] in raster order, in which those known are as given; and the
    number of forwards that each image took, int32 [B].

  Raises:
    UserError: settings that the model cannot follow.
  """
  if not given.known.any():
    return generate_codes(config, sampling, inputs, condition)
  sampling.check_model(config)
  filters, T = sampling.active_filters, config.image_tokens
  codes_BT, known_BT, candidates = given.codes, given.known, given.candidates
  order_BT = decoding_order(sampling.order, inputs.keys, T, known_BT)
  if order_BT is not None:
    codes_BT = jnp.take_along_axis(codes_BT, order_BT, axis=1)
    known_BT = jnp.take_along_axis(known_BT, order_BT, axis=1)
  if order_BT is not None or not _known_later(known_BT).any():
    candidates = 1
  problem = make_problem(config, inputs, codes_BT, known_BT, candidates, order_BT)
  condition = repeat_rows(condition, candidates)
  ends = _row_ends(config)
  longer = dict(itertools.pairwise(ends))
  drawn = first_row(config, filters, ends[0], problem, condition)
  for row in range(1, config.grid_hw[0]):
    if row in longer:
      drawn = with_room(config, longer[row], drawn)
    drawn = next_row(config, filters, problem, drawn)
  codes_BT = to_raster(choose(config, problem, drawn), order_BT)
  return codes_BT, np.full(len(codes_BT), config.image_tokens, np.int32)


def make_problem(
  config: GPTConfig,
  inputs: DecodeInputs,
  codes_BT: np.ndarray | jax.Array,
  known_BT: np.ndarray | jax.Array,
  candidates: int,
  order_BT: jax.Array | None = None,
) -> Problem:
  """Makes a problem of images whose codes are in the order of decoding.

  The first candidate of an image has the image's own key.
  """
  number_N = config.image_tokens + jnp.arange(1, candidates)
  other_BN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
    inputs.keys, number_N
  )
  keys_BN = jnp.concatenate([inputs.keys[:, None], other_BN], axis=1)
  wide = inputs._replace(
    keys=keys_BN.reshape(-1),
    condition_mask=repeat_rows(inputs.condition_mask, candidates),
    settings=jax.tree.map(lambda x: repeat_rows(x, candidates), inputs.settings),
  )
  order_MT = repeat_rows(order_BT, candidates)
  return Problem(wide, inputs.keys, codes_BT, known_BT, order_MT)


@functools.partial(jax.jit, static_argnames=("config", "filters", "rows"))
def first_row(
  config: GPTConfig,
  filters: ActiveFilters,
  rows: int,
  problem: Problem,
  condition: jax.Array,
) -> Candidates:
  """Draws the first row of codes, with a cache for so many rows.

  `condition` is that of M candidates.
  """
  p, M, columns = problem, len(problem.inputs.keys), config.grid_hw[1]
  order_RT = expand_for_guidance(p.order, filters.guidance)
  logits_RV, cache = prefill(
    config, filters, p.inputs, condition, rows * columns, order_RT
  )
  start = DecodeState(jnp.zeros(M, jnp.int32), jnp.int32(0), cache)
  codes_MT = jnp.zeros((M, config.image_tokens), jnp.int32)
  drawn = Candidates(start, codes_MT, jnp.zeros(M))
  drawn = _take_code(config, filters, p, drawn, logits_RV)
  return _draw(config, filters, p, drawn, columns - 1)


@functools.partial(
  jax.jit, static_argnames=("config", "filters"), donate_argnames="drawn"
)
def next_row(
  config: GPTConfig, filters: ActiveFilters, problem: Problem, drawn: Candidates
) -> Candidates:
  """Draws another row of codes, which the cache must have room for."""
  return _draw(config, filters, problem, drawn, config.grid_hw[1])


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def with_room(config: GPTConfig, rows: int, drawn: Candidates) -> Candidates:
  """Returns the candidates with a cache for so many rows of codes."""
  length = config.prefix_tokens + rows * config.grid_hw[1] - 1
  cache = resize_cache(drawn.state.cache, length)
  return drawn._replace(state=drawn.state._replace(cache=cache))


@functools.partial(jax.jit, static_argnames="config")
def choose(config: GPTConfig, problem: Problem, drawn: Candidates) -> jax.Array:
  """Returns the codes of a candidate of each image, chosen by weight: int32 [B, T]."""
  log_weight_BN = drawn.log_weight.reshape(len(problem.keys), -1)
  N = log_weight_BN.shape[1]
  keys_B = _extra_keys(config, problem, config.image_tokens + 1)
  noise_BN = jax.vmap(lambda key: jax.random.gumbel(key, (N,)))(keys_B)
  chosen_B = jnp.argmax(log_weight_BN + noise_BN, axis=1)
  # Where nothing known followed, an image is the one that its own key draws.
  chosen_B = jnp.where(_known_later(problem.known), chosen_B, 0)
  codes_BNT = drawn.codes.reshape(-1, N, config.image_tokens)
  return jnp.take_along_axis(codes_BNT, chosen_B[:, None, None], axis=1)[:, 0]


def _draw(
  config: GPTConfig,
  filters: ActiveFilters,
  problem: Problem,
  drawn: Candidates,
  count: int,
) -> Candidates:
  """Draws the codes up to the end of a row, and resamples."""
  p, order_RT = problem, expand_for_guidance(problem.order, filters.guidance)

  def step(drawn: Candidates, _):
    logits_RV, cache = decode_step(config, filters, p.inputs, drawn.state, order_RT)
    drawn = drawn._replace(state=drawn.state._replace(cache=cache))
    return _take_code(config, filters, p, drawn, logits_RV), None

  drawn, _ = jax.lax.scan(step, drawn, length=count)
  if len(drawn.log_weight) == len(p.keys):  # one candidate an image
    return drawn
  return _resample(drawn, _extra_keys(config, p, drawn.state.index))


def _take_code(
  config: GPTConfig,
  filters: ActiveFilters,
  problem: Problem,
  drawn: Candidates,
  logits_RV: jax.Array,
) -> Candidates:
  """Takes the next code of every candidate, known or drawn."""
  p, index = problem, drawn.state.index
  settings, N = p.inputs.settings, len(drawn.log_weight) // len(p.keys)
  logits_MV = guided_logits(config, filters, p.inputs, logits_RV, index)
  keys_M = code_keys(p.inputs.keys, index)
  code_M = sample_codes(logits_MV, keys_M, settings, filters)
  known_M, given_M = (repeat_rows(x[:, index], N) for x in (p.known, p.given))
  code_M = jnp.where(known_M, given_M, code_M)
  log_weight_M = drawn.log_weight
  if N > 1:
    # A filter that removes a known code would end all candidates: it does not count.
    log_p_MV = jax.nn.log_softmax(logits_MV / settings.temperature[:, None])
    log_p_M = jnp.take_along_axis(log_p_MV, code_M[:, None], axis=1)[:, 0]
    log_weight_M += jnp.where(known_M, log_p_M, 0.0)
  state = drawn.state._replace(code=code_M, index=index + 1)
  return Candidates(state, drawn.codes.at[:, index].set(code_M), log_weight_M)


def _extra_keys(config: GPTConfig, problem: Problem, number: Any) -> jax.Array:
  """Returns keys [B] beyond those of codes and candidates."""
  candidates = len(problem.inputs.keys) // len(problem.keys)
  return code_keys(problem.keys, config.image_tokens + candidates + number)


def _row_ends(config: GPTConfig) -> list[int]:
  """Returns `cache_segment_ends`, in whole rows of codes."""
  rows = config.grid_hw[0]
  count = min(rows, len(cache_segment_ends(config)))
  return [rows * (i + 1) // count for i in range(count)]


def repeat_rows(x: Any, count: int) -> Any:
  """Returns an array whose rows are repeated side by side; None stays None."""
  return None if x is None else jnp.repeat(x, count, axis=0)


def _resample(drawn: Candidates, keys_B: jax.Array) -> Candidates:
  """Replaces light candidates by copies of heavy ones, in the images that need it."""
  B = len(keys_B)
  log_weight_BN = drawn.log_weight.reshape(B, -1)
  weight_BN = jax.nn.softmax(log_weight_BN)
  N = weight_BN.shape[1]
  few_B1 = 1 / jnp.sum(weight_BN**2, axis=1, keepdims=True) < FEW * N
  source_BN = jnp.where(few_B1, systematic(weight_BN, keys_B), jnp.arange(N))

  def pick(x):
    """Copies candidates' entries, one or a pair of rows each."""
    x_BN = x.reshape(B, N, -1, *x.shape[1:])
    return jax.vmap(lambda x_N, source_N: x_N[source_N])(x_BN, source_BN).reshape(
      x.shape
    )

  state = drawn.state._replace(
    code=pick(drawn.state.code), cache=jax.tree.map(pick, drawn.state.cache)
  )
  log_weight_BN = jnp.where(few_B1, 0.0, log_weight_BN)
  return Candidates(state, pick(drawn.codes), log_weight_BN.reshape(-1))


def systematic(weight_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
  """Returns which candidates N new ones are copies of, int32 [B, N], by weight.

  Systematic resampling: candidate n gets N w_n copies, rounded up or down.
  """
  N = weight_BN.shape[1]
  start_B = jax.vmap(jax.random.uniform)(keys_B)
  at_BN = (jnp.arange(N) + start_B[:, None]) / N
  edges_BN = jnp.cumsum(weight_BN, axis=1)
  source_BN = jax.vmap(lambda edges, at: jnp.searchsorted(edges, at, side="right"))(
    edges_BN, at_BN
  )
  return jnp.minimum(source_BN, N - 1)


def _known_later(known_BT: Any) -> Any:
  """Whether an image has a known code after one that is not, bool [B]."""
  return (known_BT[:, 1:] & ~known_BT[:, :-1]).any(axis=1)
