"""The slot engine: banks of slots, and beside them the edits."""

from concurrent.futures import ThreadPoolExecutor
import itertools

import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.parallel.mesh import on_mesh
from llamagen_jax.sampling.sample import mesh_of, num_data_shards
from llamagen_jax.serving.bank import Bank, make_programs
from llamagen_jax.serving.edit_engine import EditEngine
from llamagen_jax.serving.request import Request
from llamagen_jax.weights import bundle

CHUNK = 8  # forwards: short to wait for, long beside the host's work between chunks
# Of a CPU. A step of 64 slots of GPT-B took 382 ms in one bank, 321 in two, 271 in
# four, 258 in eight and 353 in sixteen (XLA 0.10.2, two cores).
MOST_BANKS, LEAST_SLOTS = 8, 4
SEGMENTS = 4  # lengths of a cache; the chunk is compiled for each


class Engine:
  """A fixed number of slots on the devices of a transformer. Not for several threads.

  A request with guidance takes a whole slot; two without share one.

  On a CPU slots lie in banks, each with a thread of its own: XLA computes attention in
  the thread that runs a program, and an idle bank costs nothing. Elsewhere all slots
  are one bank, because every bank reads the weights.
  """

  def __init__(
    self,
    gpt: bundle.Transformer,
    slots: int,
    chunk: int,
    window: int = 1,
    candidates: int = 0,
    banks: int | None = None,
  ):
    """Makes idle slots; requests join and leave every `chunk` forwards of a window.

    Args:
      gpt: the transformer.
      slots: of all banks.
      chunk: forwards.
      window: codes that a forward reads.
      candidates: of a request with known codes, drawn beside the slots; 0 = none.
      banks: a divisor of `slots`; default: by the kind of the devices.

    Raises:
      UserError: the mesh that `gpt` is on cannot share the slots out evenly.
    """
    mesh, c = mesh_of(gpt), gpt.config
    if slots % num_data_shards(mesh):
      raise UserError(
        f"{slots} slots: expected a multiple of {num_data_shards(mesh)}, the number of"
        " data shards of the mesh"
      )
    on_one_cpu = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
    banks = banks or (num_banks(slots) if on_one_cpu else 1)
    segments = SEGMENTS if on_one_cpu else 1
    self.config, self.slots, self._mesh = c, slots, mesh
    params = decoding_params(c, gpt.params)
    programs = make_programs(c, slots // banks, window, chunk, segments, mesh)
    self._banks = [Bank(c, params, programs, mesh) for _ in range(banks)]
    self._threads = ThreadPoolExecutor(banks, thread_name_prefix="bank")
    self._edits = EditEngine(c, params, candidates) if candidates else None
    self._edited_codes = 0

  @property
  def codes_sampled(self) -> int:
    """Codes of all requests since the warm-up."""
    return self._edited_codes + sum(bank.codes_sampled for bank in self._banks)

  @property
  def busy_rows(self) -> int:
    return sum(bank.busy_rows for bank in self._banks)

  @property
  def idle(self) -> bool:
    """Whether `advance` has nothing to compute and nothing to read."""
    edits = self._edits is not None and not self._edits.idle
    return not edits and all(bank.idle for bank in self._banks)

  def warm_up(self) -> None:
    """Compiles the programs that `join` and `advance` run."""
    c = self.config
    condition, mask = 0, None
    if c.condition == "caption":
      condition = np.zeros((c.caption_tokens, c.caption_dim), np.float32)
      mask = np.ones(c.caption_tokens, np.int32)
    key = np.zeros(2, np.uint32)
    self._banks[0].warm_up()  # the others have the same programs
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
    self._edited_codes = 0
    for bank in self._banks:
      bank.codes_sampled = 0

  def join(self, request: Request) -> bool:
    """Gives a request its rows; returns False if they are taken."""
    if request.known is not None:
      return self._edits.join(request)

    def wish(bank: Bank) -> tuple[bool, int]:
      """Half of a slot that is in use first; then few banks, and these full."""
      return not request.guided and bool(bank.half_slots), bank.busy_rows

    return any(
      bank.join(request) for bank in sorted(self._banks, key=wish, reverse=True)
    )

  def leave(self, request: Request) -> None:
    """Frees the rows of a request, if it has any; it gets no more codes."""
    if request.known is not None:
      self._edits.leave(request)
    for bank in self._banks:
      bank.leave(request)

  def advance(self) -> list[Request]:
    """Starts a chunk of codes, and reads those of the chunk before.

    Returns:
      The requests that got codes. One that has all of them has left its rows.
    """
    busy = [bank for bank in self._banks if not bank.idle]
    if len(busy) > 1:
      sampled = list(itertools.chain(*self._threads.map(Bank.advance, busy)))
    else:
      sampled = [request for bank in busy for request in bank.advance()]
    return [*sampled, *self._advance_edits()]

  def _advance_edits(self) -> list[Request]:
    if self._edits is None:
      return []
    with on_mesh(self._mesh):
      edited = self._edits.advance()
    self._edited_codes += self.config.grid_hw[1] * len(edited)
    return edited


def num_banks(slots: int) -> int:
  """Returns how many banks of one size slots make on a CPU."""
  most = max(1, min(MOST_BANKS, slots // LEAST_SLOTS))
  return max(banks for banks in range(1, most + 1) if slots % banks == 0)
