"""The thread that generates codes, and the one beside it that renders them."""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import threading
import time

from absl import logging
import numpy as np

from llamagen_jax.serving.engine import Engine
from llamagen_jax.serving.request import Request

STOPPING = "the server stops"
SMOOTHING = 0.1  # weight of a new image in the mean of seconds


class QueueFull(Exception):
  """There are fewer free places than requests; try again later."""


class WorkerDied(Exception):
  """The thread that generates has ended, and with it every request."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """The codes of an image so far, int32 [t] in raster order."""

  codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Finished:
  """An image, uint8 [H, W, 3], and all its codes, int32 [T]."""

  image: np.ndarray
  codes: np.ndarray


class RequestHandle:
  """A submitted request. Iterating over it, in one event loop, waits for its events."""

  def __init__(self, worker: "Worker", request: Request):
    """Makes a handle, in the event loop that is going to follow it."""
    self.request = request
    self.joined = 0.0  # when it got its slot, by time.monotonic
    self._worker = worker
    self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

  async def __aiter__(self) -> AsyncIterator[Progress | Finished]:
    """Yields events and ends after `Finished`; raises `WorkerDied`."""
    while True:
      event = await self._events.get()
      if isinstance(event, Exception):
        raise event
      yield event
      if isinstance(event, Finished):
        return

  def cancel(self) -> None:
    """Frees the place or the slot within two chunks; harmless after the end."""
    self._worker.cancel(self)

  def post(self, event: Progress | Finished | WorkerDied) -> None:
    """Passes an event on to the loop, from any thread."""
    try:
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)
    except RuntimeError:  # the loop is closed: nobody waits any more
      logging.info("an event came after its loop had ended")


class Worker:
  """Generates with an engine, first come, first served.

  Args:
    engine: its slots; from `start` on only the thread here touches it.
    render: int32 codes [1, T] -> uint8 images [1, H, W, 3].
    queue: requests that may wait while all slots are busy.
  """

  def __init__(
    self, engine: Engine, render: Callable[[np.ndarray], np.ndarray], queue: int
  ):
    self.mean_seconds = 1.0  # of an image in its slot
    self._engine, self._render, self._queue = engine, render, queue
    self._state = threading.Condition()  # guards all that follows
    self._waiting: collections.deque[RequestHandle] = collections.deque()
    self._generating: dict[Request, RequestHandle] = {}
    self._rendering: set[RequestHandle] = set()
    self._cancelled: list[RequestHandle] = []
    self._ready = self._dead = self._stopping = False
    self._thread = threading.Thread(target=self._main, name="generate", daemon=True)
    self._renderer = ThreadPoolExecutor(1, thread_name_prefix="render")

  @property
  def ready(self) -> bool:
    """Everything is compiled, and the thread lives."""
    return self._ready and self.alive

  @property
  def alive(self) -> bool:
    """The thread lives, if only to compile."""
    return self._thread.is_alive() and not self._dead

  @property
  def queued(self) -> int:
    """Requests that wait for a slot."""
    return len(self._waiting)

  @property
  def capacity(self) -> int:
    """Requests that an idle worker takes at once."""
    return self._queue + self._engine.slots

  @property
  def free_places(self) -> int:
    """Requests that `submit` takes before it raises `QueueFull`: queue + free slots.

    An image that is being rendered holds no place, unless more wait for the renderer
    than there are slots: then the renderer is what everybody waits for.
    """
    with self._state:
      late = max(0, len(self._rendering) - self._engine.slots)
      held = sum(1.0 if r.guided else 0.5 for r in self._generating)
      return max(0, int(self.capacity - len(self._waiting) - held - late))

  @property
  def busy_slots(self) -> float:
    """Slots in use; a slot of which one row is used counts half."""
    return self._engine.busy_rows / 2

  @property
  def slots(self) -> int:
    return self._engine.slots

  @property
  def codes_sampled(self) -> int:
    """Codes of all requests since the start."""
    return self._engine.codes_sampled

  def start(self) -> None:
    """Starts the thread, which compiles first."""
    self._thread.start()

  def submit(self, requests: Sequence[Request]) -> list[RequestHandle]:
    """Queues all requests, from the event loop that is going to follow them, or none.

    Raises:
      QueueFull: there are not as many places.
    """
    handles = [RequestHandle(self, request) for request in requests]
    with self._state:
      if self.free_places < len(handles):
        raise QueueFull
      if not self.alive:
        for handle in handles:
          handle.post(WorkerDied("it takes no requests"))
      else:
        self._waiting += handles
        self._state.notify()
    return handles

  def cancel(self, handle: RequestHandle) -> None:
    """Gives up a request, wherever it is."""
    with self._state:
      self._rendering.discard(handle)
      if handle in self._waiting:
        self._waiting.remove(handle)
      elif handle.request in self._generating and handle not in self._cancelled:
        self._cancelled.append(handle)

  def stop(self) -> None:
    """Ends the thread after the chunk it is in, and the image being rendered."""
    with self._state:
      self._stopping = True
      self._state.notify()
    if self._thread.is_alive():
      self._thread.join()
    self._renderer.shutdown()

  def _main(self) -> None:
    try:
      self._engine.warm_up()
      self._ready = True
      while self._wait():
        self._turn()
    except Exception as error:
      logging.exception("the engine has died")
      self._die(WorkerDied(str(error)))
    else:
      self._die(WorkerDied(STOPPING))

  def _wait(self) -> bool:
    """Waits for something to do; returns False at the end."""
    with self._state:
      while self._engine.idle and not (self._stopping or self._waiting):
        self._state.wait()
      return not self._stopping

  def _turn(self) -> None:
    """Lets requests leave and join, and generates a chunk of codes for all."""
    with self._state:
      gone, self._cancelled = self._cancelled, []
      for handle in gone:
        del self._generating[handle.request]
    for handle in gone:
      self._engine.leave(handle.request)
    while self._join_next():
      pass
    for request in self._engine.advance():
      handle = self._generating[request]
      codes = np.array(request.codes, np.int32)
      if len(codes) < self._engine.config.image_tokens:
        handle.post(Progress(codes))
      else:
        self._start_rendering(handle, codes)

  def _join_next(self) -> bool:
    """Lets the first in the queue join. The lock is free while the device works.

    Edits do not wait for slots, nor other requests for an edit to end.
    """
    with self._state:
      # The first of each kind: of equal keys the last one stays.
      heads = {h.request.known is None: h for h in reversed(self._waiting)}
    first = next((h for h in heads.values() if self._engine.join(h.request)), None)
    if first is None:
      return False
    with self._state:
      if first in self._waiting:
        self._waiting.remove(first)
        self._generating[first.request] = first
        first.joined = time.monotonic()
      else:  # given up meanwhile
        self._engine.leave(first.request)
    return True

  def _start_rendering(self, handle: RequestHandle, codes: np.ndarray) -> None:
    seconds = time.monotonic() - handle.joined
    self.mean_seconds += SMOOTHING * (seconds - self.mean_seconds)
    with self._state:
      del self._generating[handle.request]
      if handle in self._cancelled:
        self._cancelled.remove(handle)
        return
      self._rendering.add(handle)
    self._renderer.submit(self._finish, handle, codes)

  def _finish(self, handle: RequestHandle, codes: np.ndarray) -> None:
    """Renders codes, in the thread beside the one that generates."""
    if handle not in self._rendering:  # given up since
      return
    try:
      if self._stopping:
        raise WorkerDied(STOPPING)
      image = handle.request.finish(self._render(codes[None])[0])
      event = Finished(image, codes)
    except WorkerDied as error:
      event = error
    except Exception as error:
      logging.exception("the tokenizer has failed")
      event = WorkerDied(str(error))
    with self._state:
      self._rendering.discard(handle)  # first: who hears of it may ask again at once
    handle.post(event)

  def _die(self, error: WorkerDied) -> None:
    with self._state:
      self._dead = True
      for handle in [*self._waiting, *self._generating.values()]:
        handle.post(error)
      self._waiting.clear()
      self._generating.clear()
