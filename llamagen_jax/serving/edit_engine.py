"""The engine of edits: one image with known codes at a time, a row of codes a turn."""

from typing import Any

import jax
import numpy as np

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.sampling.decode import DecodeInputs
from llamagen_jax.sampling.keys import as_keys
from llamagen_jax.sampling.known_codes import (
  Candidates,
  Problem,
  choose,
  first_row,
  make_problem,
  next_row,
  repeat_rows,
)
from llamagen_jax.sampling.slots import ACTIVE_FILTERS
from llamagen_jax.serving.request import Request


class EditEngine:
  """Draws the candidates of one request beside the slots. Not for several threads.

  All settings are arrays and the cache has its full length, so that no mixture of
  requests compiles anything; only the first negative prompt does.
  """

  def __init__(self, config: GPTConfig, params: dict, candidates: int):
    """Makes an idle engine, of parameters from `decoding_params`."""
    self._config, self._params, self._candidates = config, params, candidates
    self._request: Request | None = None
    self._problem: Problem | None = None
    self._drawn: Candidates | None = None

  @property
  def idle(self) -> bool:
    return self._request is None

  def join(self, request: Request) -> bool:
    """Takes a request up; returns False while it has another one."""
    if not self.idle:
      return False
    self._request, self._drawn = request, None
    return True

  def leave(self, request: Request) -> None:
    """Gives a request up, if it is this engine's."""
    if request is self._request:
      self._request = self._problem = self._drawn = None

  def advance(self) -> list[Request]:
    """Draws a row of codes; returns the request, which has left if it has all of them.

    Until then its codes are those of the candidate that weighs most.
    """
    request, c = self._request, self._config
    if request is None:
      return []
    if self._drawn is None:
      self._problem, condition = self._start(request)
      self._drawn = first_row(c, ACTIVE_FILTERS, c.grid_hw[0], self._problem, condition)
    else:
      self._drawn = next_row(c, ACTIVE_FILTERS, self._problem, self._drawn)
    count = int(self._drawn.state.index)
    if count == c.image_tokens:
      request.codes = np.asarray(choose(c, self._problem, self._drawn))[0].tolist()
      self.leave(request)
    else:
      best = int(np.argmax(self._drawn.log_weight))
      request.codes = np.asarray(self._drawn.codes)[best, :count].tolist()
    request.forwards = count
    return [request]

  def _start(self, request: Request) -> tuple[Problem, jax.Array]:
    """Returns the problem of a request, and the condition of its candidates."""
    condition, mask = np.asarray(request.condition), request.condition_mask
    if request.negative is not None:
      pairs: Any = [condition, request.negative], [mask, request.negative_mask]
      condition, mask = map(np.stack, pairs)
    inputs = DecodeInputs(
      self._params, as_keys(request.key[None]), None if mask is None else mask[None],
      request.sampling.for_batch(1),
    )  # fmt: skip
    known = request.known[None], request.is_known[None]
    problem = make_problem(self._config, inputs, *known, self._candidates)
    return problem, repeat_rows(condition[None], self._candidates)
