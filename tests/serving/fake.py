"""A backend without a model, whose codes are a function of the request's key."""

import asyncio
from collections.abc import Callable

import jax
import numpy as np

from llamagen_jax.serving.protocol import Finished, Progress, QueueFull, WorkerDied
from llamagen_jax.serving.request import Request

VOCABULARY = 16


def codes_of(request: Request, count: int) -> np.ndarray:
  """What the fake draws for a request, int32 [count]."""
  seed = np.asarray(jax.random.key_data(request.key))
  return np.random.default_rng(seed).integers(0, VOCABULARY, count, np.int32)


class FakeHandle:
  def __init__(self, backend: "FakeDrawer", request: Request):
    self._drawer = backend
    self.codes, self.drawn = codes_of(request, backend.image_tokens), 0
    self.events: asyncio.Queue = asyncio.Queue()

  async def __aiter__(self):
    while True:
      event = await self.events.get()
      if isinstance(event, Exception):
        raise event
      yield event
      if isinstance(event, Finished):
        return

  def cancel(self) -> None:
    for line in (self._drawer.waiting, self._drawer.running):
      if self in line:
        line.remove(self)


class FakeDrawer:
  """Slots that move `chunk` codes a tick, in the event loop."""

  def __init__(
    self, render: Callable, image_tokens: int, *, slots=2, places=4, tick=0.002, chunk=1
  ):
    self.render, self.image_tokens = render, image_tokens
    self.slots, self.places, self.tick, self.chunk = slots, places, tick, chunk
    self.ready = self.alive = True
    self.codes_drawn = 0
    self.last = image_tokens  # no image gets beyond this code
    self.waiting: list[FakeHandle] = []
    self.running: list[FakeHandle] = []
    self.requests: list[Request] = []
    self.stopped = False

  queued = property(lambda self: len(self.waiting))
  busy_slots = property(lambda self: len(self.running))
  free_places = property(lambda self: self.places - len(self.waiting))

  def start(self) -> None:
    self._task = asyncio.get_running_loop().create_task(self._run())

  def stop(self) -> None:
    self.stopped = True

  def submit(self, request: Request) -> FakeHandle:
    if not self.free_places:
      raise QueueFull
    self.requests.append(request)
    handle = FakeHandle(self, request)
    self.waiting.append(handle)
    return handle

  def die(self) -> None:
    """As a thread that ends with an exception."""
    self.ready = self.alive = False
    for handle in [*self.running, *self.waiting]:
      handle.events.put_nowait(WorkerDied("fake"))
    self.running, self.waiting = [], []

  async def _run(self) -> None:
    while not self.stopped:
      await asyncio.sleep(self.tick)
      while self.waiting and len(self.running) < self.slots:
        self.running.append(self.waiting.pop(0))
      for handle in list(self.running):
        fresh = min(self.chunk, self.last - handle.drawn)
        handle.drawn += fresh
        self.codes_drawn += fresh
        codes = handle.codes[: handle.drawn]
        if handle.drawn < self.image_tokens:
          handle.events.put_nowait(Progress(codes))
          continue
        self.running.remove(handle)
        handle.events.put_nowait(Finished(self.render(codes[None])[0], codes))
