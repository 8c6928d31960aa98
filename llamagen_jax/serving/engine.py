"""The slot engine: which request holds which rows, and a chunk of steps for all."""

import contextlib
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import batch_sharding, replicated, spec
from llamagen_jax.sampling.sample import mesh_of, num_data_shards
from llamagen_jax.sampling.slots import (
  ChunkInputs,
  ChunkOutputs,
  Conditions,
  init_state,
  prefill_rows,
  run_chunk,
)
from llamagen_jax.sampling.window import WindowState
from llamagen_jax.serving.edit_engine import EditEngine
from llamagen_jax.serving.request import Request
from llamagen_jax.weights import bundle

# Images that a prefill starts: the first number that is enough. By the TPU's compiler
# (XL, 120 tokens, v6e) four prefills read memory for 3.8 ms, and one of four images
# computes for 1.5 ms, so that more of them would gain nothing.
PREFILLS = (1, 4)
CHUNK = 8  # forwards: short to wait for, long beside the host's work between chunks


class _Chunk(NamedTuple):
  """Codes that the device is still computing, and the requests that they are of."""

  outputs: ChunkOutputs
  rows: dict[Request, int]  # the row that holds a request's codes


class Engine:
  """A fixed number of slots on the devices of a transformer. Not for several threads.

  A request with guidance takes a whole slot; two without share one.

  The device runs one chunk ahead of the codes that the host has read. A forward gives
  an image at least one code; with a window of 1 that is exact, so that the host knows
  without reading when an image is complete.
  """

  def __init__(
    self,
    gpt: bundle.Transformer,
    slots: int,
    chunk: int,
    window: int = 1,
    candidates: int = 0,
  ):
    """Makes idle slots; requests join and leave every `chunk` forwards of a window.

    With `candidates`, requests with known codes are drawn beside the slots.

    Raises:
      UserError: the mesh that `gpt` is on cannot share the slots out evenly.
    """
    mesh, c = mesh_of(gpt), gpt.config
    if slots % num_data_shards(mesh):
      raise UserError(
        f"{slots} slots: expected a multiple of {num_data_shards(mesh)}, the number of"
        " data shards of the mesh"
      )
    self.config, self.slots, self.codes_sampled = c, slots, 0
    self._chunk_forwards, self._mesh = chunk, mesh
    self._params = decoding_params(c, gpt.params)
    self._row_owner: list[Request | None] = [None] * (2 * slots)
    self._least_R = np.zeros(2 * slots, np.int32)  # codes that a row has at least
    self._keys_R = np.zeros((2 * slots, 2), np.uint32)
    self._settings = SamplingConfig().for_batch(2 * slots)
    self._joined: dict[Request, list[int]] = {}  # rows that no prefill has started yet
    self._unread: _Chunk | None = None
    self._edits = EditEngine(c, self._params, candidates) if candidates else None
    make = functools.partial(init_state, c, slots, window, chunk)
    sharding = None if mesh is None else state_sharding(mesh, jax.eval_shape(make))
    with self._on_mesh():
      self._state = jax.jit(make, out_shardings=sharding)()
    self._prefill = jax.jit(
      functools.partial(prefill_rows, c), donate_argnums=1, out_shardings=sharding
    )
    self._run = jax.jit(
      functools.partial(run_chunk, c, window, chunk),
      donate_argnums=1,
      out_shardings=(sharding, None if mesh is None else replicated(mesh)),
    )

  @property
  def busy_rows(self) -> int:
    return sum(owner is not None for owner in self._row_owner)

  @property
  def idle(self) -> bool:
    """Whether `advance` has nothing to compute and nothing to read."""
    edits = self._edits is not None and not self._edits.idle
    return self._unread is None and not self.busy_rows and not edits

  def warm_up(self) -> None:
    """Compiles the programs that `join` and `advance` run."""
    c = self.config
    condition, mask = 0, None
    if c.condition == "caption":
      condition = np.zeros((c.caption_tokens, c.caption_dim), np.float32)
      mask = np.ones(c.caption_tokens, np.int32)
    key = np.zeros(2, np.uint32)
    for count in (1, 2):  # of one slot; takes all of PREFILLS
      requests = [Request(condition, key, condition_mask=mask) for _ in range(count)]
      for request in requests:
        self.join(request)
      self.advance()
      for request in requests:
        self.leave(request)
      self.advance()
    if self._edits is not None:
      known = np.zeros(c.image_tokens, np.int32), np.ones(c.image_tokens, bool)
      self.join(
        Request(condition, key, condition_mask=mask, known=known[0], is_known=known[1])
      )
      while not self.idle:
        self.advance()
    self.codes_sampled = 0

  def join(self, request: Request) -> bool:
    """Gives a request its rows; returns False if they are taken."""
    if request.known is not None:
      return self._edits.join(request)
    rows = self._free_rows(request.guided)
    if not rows:
      return False
    self._joined[request] = [rows[0], rows[-1]]
    for row in rows:
      self._row_owner[row], self._least_R[row] = request, 0
      self._keys_R[row] = request.key
    self._set(rows[0], request.sampling)  # of two, the second only guides
    return True

  def leave(self, request: Request) -> None:
    """Frees the rows of a request, if it has any; it gets no more codes."""
    if request.known is not None:
      self._edits.leave(request)
      return
    self._free(request)
    self._joined.pop(request, None)
    if self._unread is not None:
      self._unread.rows.pop(request, None)

  def advance(self) -> list[Request]:
    """Starts a chunk of codes, and reads those of the chunk before.

    Returns:
      The requests that got codes. One that has all of them has left its rows.
    """
    return [*self._advance_slots(), *self._advance_edits()]

  def _advance_edits(self) -> list[Request]:
    if self._edits is None:
      return []
    with self._on_mesh():
      edited = self._edits.advance()
    self.codes_sampled += self.config.grid_hw[1] * len(edited)
    return edited

  def _advance_slots(self) -> list[Request]:
    unread, self._unread = self._unread, self._start_chunk() if self.busy_rows else None
    if unread is None:
      return []
    codes_RT, count_R, forwards_R = map(np.asarray, unread.outputs)
    for request, row in unread.rows.items():
      new = codes_RT[row, len(request.codes) : count_R[row]].tolist()
      request.codes += new
      request.forwards = int(forwards_R[row])
      self.codes_sampled += len(new)
      if len(request.codes) == self.config.image_tokens:
        self.leave(request)
      elif self._row_owner[row] is request:
        self._least_R[row] = count_R[row] + self._chunk_forwards  # one is under way
    return list(unread.rows)

  def _start_chunk(self) -> _Chunk:
    """Dispatches a chunk for all rows, and frees those whose image it completes."""
    self._start_joined()
    shared_N = np.array([b is not None and a is not b for a, b in self._pairs()])
    # Copies: the device may read an argument after this function has changed it.
    inputs = jax.tree.map(np.copy, ChunkInputs(shared_N, self._keys_R, self._settings))
    with self._on_mesh():
      if self._mesh is not None:
        inputs = jax.device_put(inputs, batch_sharding(self._mesh))
      self._state, outputs = self._run(self._params, self._state, inputs)
    jax.tree.map(lambda x: x.copy_to_host_async(), outputs)
    rows = {owner: row for row, owner in enumerate(self._row_owner) if owner}
    self._least_R += self._chunk_forwards
    for request, row in rows.items():
      if self._least_R[row] >= self.config.image_tokens:
        self._free(request)
    return _Chunk(outputs, rows)

  def _start_joined(self) -> None:
    """Dispatches the prefills of what has joined, several images at a time."""
    joined, self._joined = list(self._joined.items()), {}
    for first in range(0, len(joined), PREFILLS[-1]):
      few = joined[first : first + PREFILLS[-1]]
      size = next(size for size in PREFILLS if size >= len(few))
      few += few[-1:] * (size - len(few))  # to start an image twice does no harm
      rows = np.concatenate([both for _, both in few])
      conditions = [_row_conditions(request) for request, _ in few]
      with self._on_mesh():
        self._state = self._prefill(
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
    half = [i for i, (a, b) in enumerate(pairs) if (a is None) != (b is None)]
    if guided:
      return [2 * whole[0], 2 * whole[0] + 1] if whole else []
    if half:
      return [2 * half[0] + (pairs[half[0]][0] is not None)]
    return [2 * whole[0]] if whole else []

  def _on_mesh(self):
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)


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
