"""A bank of slots: which request holds which rows, and a chunk of steps for all."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from llamagen_jax.gpt.cache import resize_cache
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import batch_sharding, on_mesh, replicated, spec
from llamagen_jax.sampling.decode import cache_segment_ends
from llamagen_jax.sampling.slots import (
  ChunkInputs,
  ChunkOutputs,
  Conditions,
  init_state,
  prefill_rows,
  run_chunk,
)
from llamagen_jax.sampling.window import WindowState
from llamagen_jax.serving.request import Request

# Images that a prefill starts: the first number that is enough. By the TPU's compiler
# (XL, 120 tokens, v6e) four prefills read memory for 3.8 ms, and one of four images
# computes for 1.5 ms, so that more of them would gain nothing.
PREFILLS = (1, 4)


class Programs(NamedTuple):
  """Compiled programs, which banks of the same size share."""

  init: Callable  # () -> state
  prefill: Callable  # `prefill_rows` from its third argument on
  run: Callable  # `run_chunk` from its fourth argument on
  resize: Callable  # (state, one of `ends`) -> state with room for so many codes
  ends: list[int]  # codes that a cache has room for before a chunk, the shortest first
  forwards: int  # of a chunk
  codes: int  # of a chunk at most


def make_programs(
  config: GPTConfig,
  slots: int,
  window: int,
  forwards: int,
  segments: int,
  mesh: Mesh | None,
) -> Programs:
  """Returns the programs of banks of `slots`, which are compiled when first called.

  A cache has one of `segments` lengths, or of fewer for an image of few codes.
  """
  codes = window * forwards
  init = functools.partial(init_state, config, slots, window, forwards)
  sharding = None if mesh is None else state_sharding(mesh, jax.eval_shape(init))
  outputs = None if mesh is None else replicated(mesh)

  def resize(state: WindowState, end: int) -> WindowState:
    length = config.prefix_tokens - 1 + end + codes
    return state._replace(cache=resize_cache(state.cache, length))

  return Programs(
    jax.jit(init, out_shardings=sharding),
    jax.jit(
      functools.partial(prefill_rows, config), donate_argnums=1, out_shardings=sharding
    ),
    jax.jit(
      functools.partial(run_chunk, config, window, forwards),
      donate_argnums=1,
      out_shardings=(sharding, outputs),
    ),
    jax.jit(resize, static_argnums=1, out_shardings=sharding),
    cache_segment_ends(config, segments),
    forwards,
    codes,
  )


class _Chunk(NamedTuple):
  """Codes that the device is still computing, and the requests that they are of."""

  outputs: ChunkOutputs
  rows: dict[Request, int]  # the row that holds a request's codes


class Bank:
  """A fixed number of slots in one program. Not for several threads at a time.

  A request with guidance takes a whole slot; two without share one.

  The device runs one chunk ahead of the codes that the host has read. A forward gives
  an image at least one code; with a window of 1 that is exact, so that the host knows
  without reading when an image is complete.

  XLA reads the whole cache. So it is only as long, in a few steps, as the image with
  the most codes needs it to be.
  """

  def __init__(
    self, config: GPTConfig, params: dict, programs: Programs, mesh: Mesh | None
  ):
    """Makes idle slots, of parameters from `decoding_params`."""
    self._config, self._params, self._programs, self._mesh = (
      config, params, programs, mesh,
    )  # fmt: skip
    with on_mesh(self._mesh):
      self._state = programs.init()
    self._segment = len(programs.ends) - 1  # of `ends`, the cache's
    rows = len(self._state.count)
    self._row_owner: list[Request | None] = [None] * rows
    self._least_R = np.zeros(rows, np.int32)  # codes that a row has at least
    self._most_R = np.zeros(rows, np.int32)  # and at most, when its next chunk starts
    self._keys_R = np.zeros((rows, 2), np.uint32)
    self._settings = SamplingConfig().for_batch(rows)
    self._joined: dict[Request, list[int]] = {}  # rows that no prefill has started yet
    self._unread: _Chunk | None = None
    self.codes_sampled = 0

  @property
  def busy_rows(self) -> int:
    return sum(owner is not None for owner in self._row_owner)

  @property
  def half_slots(self) -> list[int]:
    """Numbers of the slots with one free row, which takes an image without guidance."""
    return [i for i, (a, b) in enumerate(self._pairs()) if (a is None) != (b is None)]

  @property
  def idle(self) -> bool:
    """Whether `advance` has nothing to compute and nothing to read."""
    return self._unread is None and not self.busy_rows

  def join(self, request: Request) -> bool:
    """Gives a request its rows; returns False if they are taken."""
    rows = self._free_rows(request.guided)
    if not rows:
      return False
    self._joined[request] = [rows[0], rows[-1]]
    for row in rows:
      self._row_owner[row] = request
      self._least_R[row] = self._most_R[row] = 0
      self._keys_R[row] = request.key
    self._set(rows[0], request.sampling)  # of two, the second only guides
    return True

  def leave(self, request: Request) -> None:
    """Frees the rows of a request, if it has any; it gets no more codes."""
    self._free(request)
    self._joined.pop(request, None)
    if self._unread is not None:
      self._unread.rows.pop(request, None)

  def advance(self) -> list[Request]:
    """Starts a chunk of codes, and reads those of the chunk before.

    Returns:
      The requests that got codes. One that has all of them has left its rows.
    """
    unread, self._unread = self._unread, self._start_chunk() if self.busy_rows else None
    if unread is None:
      return []
    codes_RT, count_R, forwards_R = map(np.asarray, unread.outputs)
    for request, row in unread.rows.items():
      new = codes_RT[row, len(request.codes) : count_R[row]].tolist()
      request.codes += new
      self.codes_sampled += len(new)
      request.forwards = int(forwards_R[row])
      if len(request.codes) == self._config.image_tokens:
        self.leave(request)
      elif self._row_owner[row] is request:  # a chunk is under way
        self._least_R[row] = count_R[row] + self._programs.forwards
        self._most_R[row] = count_R[row] + self._programs.codes
    return list(unread.rows)

  def warm_up(self) -> None:
    """Compiles what an image's first chunk does not: longer caches, and the changes."""
    self._resize(0)
    for segment in range(1, len(self._programs.ends)):
      self._resize(segment)
      self._dispatch()

  def _start_chunk(self) -> _Chunk:
    """Dispatches a chunk for all rows, and frees those whose image it completes."""
    self._start_joined()
    rows = {owner: row for row, owner in enumerate(self._row_owner) if owner}
    most = min(max(self._most_R[list(rows.values())]), self._programs.ends[-1])
    self._resize(int(np.searchsorted(self._programs.ends, most)))
    outputs = self._dispatch()
    self._least_R += self._programs.forwards
    self._most_R += self._programs.codes
    for request, row in rows.items():
      if self._least_R[row] >= self._config.image_tokens:
        self._free(request)
    return _Chunk(outputs, rows)

  def _resize(self, segment: int) -> None:
    """Gives the cache another length, step by step, so that few programs do all."""
    while self._segment != segment:
      self._segment += 1 if self._segment < segment else -1
      with on_mesh(self._mesh):
        end = self._programs.ends[self._segment]
        self._state = self._programs.resize(self._state, end)

  def _dispatch(self) -> ChunkOutputs:
    shared_N = np.array([b is not None and a is not b for a, b in self._pairs()])
    # Copies: the device may read an argument after this function has changed it.
    inputs = jax.tree.map(np.copy, ChunkInputs(shared_N, self._keys_R, self._settings))
    with on_mesh(self._mesh):
      if self._mesh is not None:
        inputs = jax.device_put(inputs, batch_sharding(self._mesh))
      self._state, outputs = self._programs.run(self._params, self._state, inputs)
    jax.tree.map(lambda x: x.copy_to_host_async(), outputs)
    return outputs

  def _start_joined(self) -> None:
    """Dispatches the prefills of what has joined, several images at a time."""
    joined, self._joined = list(self._joined.items()), {}
    for first in range(0, len(joined), PREFILLS[-1]):
      few = joined[first : first + PREFILLS[-1]]
      size = next(size for size in PREFILLS if size >= len(few))
      few += few[-1:] * (size - len(few))  # to start an image twice does no harm
      rows = np.concatenate([both for _, both in few])
      conditions = [_row_conditions(request) for request, _ in few]
      with on_mesh(self._mesh):
        self._state = self._programs.prefill(
          self._params, self._state, rows,
          jax.tree.map(lambda *parts: np.concatenate(parts), *conditions),
        )  # fmt: skip

  def _free(self, request: Request) -> None:
    for row, owner in enumerate(self._row_owner):
      if owner is request:
        self._row_owner[row] = None
        self._set(row, SamplingConfig())

  def _set(self, row: int, sampling: SamplingConfig) -> None:
    for all_rows, value in zip(self._settings, sampling.for_batch(1), strict=True):
      all_rows[row] = value[0]

  def _pairs(self) -> list[tuple[Request | None, Request | None]]:
    return list(zip(self._row_owner[::2], self._row_owner[1::2], strict=True))

  def _free_rows(self, guided: bool) -> list[int]:
    """A slot's two rows, or the best single one: beside another, if there is one."""
    pairs = self._pairs()
    whole = [i for i, pair in enumerate(pairs) if pair == (None, None)]
    if guided:
      return [2 * whole[0], 2 * whole[0] + 1] if whole else []
    if half := self.half_slots:
      return [2 * half[0] + (pairs[half[0]][0] is not None)]
    return [2 * whole[0]] if whole else []


def _row_conditions(request: Request) -> Conditions:
  """Returns the conditions of the two rows of a request.

  Without a negative prompt the second row guides away from the trained unconditional
  embedding, which replaces the condition.
  """
  pairs = [
    (request.condition, request.negative),
    (request.condition_mask, request.negative_mask),
  ]
  condition, mask = (
    None if x is None else np.stack([x, x if other is None else other])
    for x, other in pairs
  )
  drop = np.array([False, request.guided and request.negative is None])
  beta = np.full(2, request.sampling.guidance_beta, np.float32)
  return Conditions(condition, mask, drop, beta)


def state_sharding(mesh: Mesh, state: WindowState) -> WindowState:
  """Returns the sharding of a state: slots on the batch axes, heads on the tensor axis.

  Args:
    mesh: of the transformer.
    state: its shapes, from `init_state`.
  """

  def sharding(leaf, names):
    names = (*names, *(None,) * (leaf.ndim - len(names)))
    return NamedSharding(mesh, spec(mesh, leaf.shape, names))

  heads = jax.tree.map(lambda x: sharding(x, ("batch", "kv_heads")), state.cache)
  rest = jax.tree.map(lambda leaf: sharding(leaf, ("batch",)), state._replace(cache=()))
  return rest._replace(cache=heads)
