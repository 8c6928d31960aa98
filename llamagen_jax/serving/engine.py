"""The slot engine: who sits in which rows, and a chunk of steps for all of them."""

import contextlib
import functools

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cache import LayerCache
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import batch_sharding, replicated, spec
from llamagen_jax.sampling import sample
from llamagen_jax.sampling.slots import (
  ChunkInputs,
  State,
  init_state,
  prefill_rows,
  run_chunk,
)
from llamagen_jax.serving.request import Request
from llamagen_jax.weights import bundle

CHUNK = 8  # steps: short to wait for, long beside what happens between two chunks


class Engine:
  """A fixed number of slots on the devices of a transformer. Not for several threads.

  A request with guidance takes a whole slot; two without share one.
  """

  def __init__(self, gpt: bundle.Transformer, slots: int, chunk: int):
    """Makes idle slots; between two joins lie `chunk` steps.

    Raises:
      UserError: the mesh that `gpt` is on cannot share the slots out evenly.
    """
    mesh, c = sample.mesh_of(gpt), gpt.config
    shards = sample.num_data_shards(mesh)
    if slots % shards:
      raise UserError(
        f"{slots} slots: expected a multiple of {shards}, which the mesh shares them"
        " among"
      )
    self.config, self.slots, self.codes_drawn = c, slots, 0
    self._chunk, self._mesh = chunk, mesh
    self._params = decoding_params(c, gpt.params)
    self._row_owner: list[Request | None] = [None] * (2 * slots)
    self._index_R = np.zeros(2 * slots, np.int32)
    self._keys_R = np.zeros((2 * slots, 2), np.uint32)
    self._rows = SamplingConfig().rows(2 * slots)
    places = None if mesh is None else state_sharding(mesh, c, slots)
    with self._on_mesh():
      make = functools.partial(init_state, c, slots)
      self._state = jax.jit(make, out_shardings=places)()
    self._admit = jax.jit(
      functools.partial(prefill_rows, c), donate_argnums=1, out_shardings=places
    )
    self._run = jax.jit(
      functools.partial(run_chunk, c, chunk),
      donate_argnums=1,
      out_shardings=(places, None if mesh is None else replicated(mesh)),
    )

  @property
  def busy_rows(self) -> int:
    return sum(owner is not None for owner in self._row_owner)

  def warm_up(self) -> None:
    """Compiles what `join` and `advance` run."""
    c = self.config
    condition, mask = 0, None
    if c.condition == "caption":
      condition = np.zeros((c.caption_tokens, c.caption_dim), np.float32)
      mask = np.ones(c.caption_tokens, np.int32)
    self.join(request := Request(condition, jax.random.key(0), condition_mask=mask))
    self.advance()
    self.leave(request)
    self.codes_drawn = 0

  def join(self, request: Request) -> bool:
    """Gives a request its rows, unless they are taken."""
    rows = self._free_rows(request.guided)
    if not rows:
      return False
    condition, mask = (
      None if x is None else np.stack([x, x])
      for x in (request.condition, request.condition_mask)
    )
    drop = np.array([False, request.guided])
    with self._on_mesh():
      self._state = self._admit(
        self._params, self._state, np.array([rows[0], rows[-1]]), condition, mask, drop
      )
    for row in rows:
      self._row_owner[row], self._index_R[row] = request, 0
      self._keys_R[row] = jax.random.key_data(request.key)
    self._set(rows[0], request.sampling)  # of two, the second only guides
    return True

  def leave(self, request: Request) -> None:
    """Frees the rows of a request, if it has any."""
    for row, owner in enumerate(self._row_owner):
      if owner is request:
        self._row_owner[row], self._index_R[row] = None, 0
        self._set(row, SamplingConfig())

  def advance(self) -> list[Request]:
    """Draws a chunk of codes. Returns who got some; who has them all has left."""
    shared_N = np.array([b is not None and a is not b for a, b in self._pairs()])
    plan = ChunkInputs(self._index_R, shared_N, self._keys_R, self._rows)
    with self._on_mesh():
      if self._mesh is not None:
        plan = jax.device_put(plan, batch_sharding(self._mesh))
      self._state, codes_CR = self._run(self._params, self._state, plan)
      codes_CR = np.asarray(codes_CR)
    moved = {owner: row for row, owner in enumerate(self._row_owner) if owner}
    for request, row in moved.items():
      missing = self.config.image_tokens - len(request.codes)
      fresh = codes_CR[:missing, row].tolist()
      request.codes += fresh
      self.codes_drawn += len(fresh)
    self._index_R[[owner is not None for owner in self._row_owner]] += self._chunk
    for request in moved:
      if len(request.codes) == self.config.image_tokens:
        self.leave(request)
    return list(moved)

  def _set(self, row: int, sampling: SamplingConfig) -> None:
    for all_rows, value in zip(self._rows, sampling.rows(1), strict=True):
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


def state_sharding(mesh: Mesh, config: GPTConfig, slots: int) -> State:
  """Slots on the batch axes of the mesh, heads on its tensor axis."""
  state = jax.eval_shape(functools.partial(init_state, config, slots))

  def place(leaf, names):
    names = (*names, *(None,) * (leaf.ndim - len(names)))
    return NamedSharding(mesh, spec(mesh, leaf.shape, names))

  heads = [
    LayerCache(*(place(x, ("batch", "kv_heads")) for x in c)) for c in state.cache
  ]
  rest = jax.tree.map(lambda leaf: place(leaf, ("batch",)), state._replace(cache=()))
  return rest._replace(cache=tuple(heads))
