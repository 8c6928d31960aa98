"""The thread that draws, and the one beside it that renders finished codes."""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
import threading

from absl import logging
import numpy as np

from llamagen_jax.serving.engine import Engine
from llamagen_jax.serving.protocol import Finished, Progress, QueueFull, WorkerDied
from llamagen_jax.serving.request import Request

Event = Progress | Finished | WorkerDied
STOPS = "the server stops"


class RequestHandle:
  """A request on its way; a `RequestHandle`. Made in the event loop that follows it."""

  def __init__(self, worker: "Worker", request: Request):
    self.request = request
    self._worker = worker
    self._loop, self._news = asyncio.get_running_loop(), asyncio.Queue()

  async def __aiter__(self) -> AsyncIterator[Progress | Finished]:
    while True:
      event = await self._news.get()
      if isinstance(event, Exception):
        raise event
      yield event
      if isinstance(event, Finished):
        return

  def cancel(self) -> None:
    self._worker.cancel(self)

  def tell(self, event: Event) -> None:
    """Passes an event on to the loop, from any thread."""
    try:
      self._loop.call_soon_threadsafe(self._news.put_nowait, event)
    except RuntimeError:  # the loop is closed: nobody waits any more
      logging.info("an event came after its loop had ended")


class Worker:
  """Draws with an engine, first come, first served; a `Backend`.

  Args:
    engine: its slots; from `start` on only the thread here touches it.
    render: int32 codes [1, T] -> uint8 images [1, H, W, 3].
    places: requests that may wait, for a slot or to be rendered.
  """

  def __init__(
    self, engine: Engine, render: Callable[[np.ndarray], np.ndarray], places: int
  ):
    self._engine, self._render, self._places = engine, render, places
    self._state = threading.Condition()  # guards all that follows
    self._waiting: collections.deque[RequestHandle] = collections.deque()
    self._drawing: dict[Request, RequestHandle] = {}
    self._rendering: set[RequestHandle] = set()
    self._cancelled: list[RequestHandle] = []
    self._ready = self._dead = self._stopping = False
    self._thread = threading.Thread(target=self._main, name="draw", daemon=True)
    self._renderer = ThreadPoolExecutor(1, thread_name_prefix="render")

  @property
  def ready(self) -> bool:
    return self._ready and self.alive

  @property
  def alive(self) -> bool:
    return self._thread.is_alive() and not self._dead

  @property
  def queued(self) -> int:
    return len(self._waiting)

  @property
  def free_places(self) -> int:
    return max(0, self._places - len(self._waiting) - len(self._rendering))

  @property
  def busy_slots(self) -> float:
    return self._engine.busy_rows / 2

  @property
  def slots(self) -> int:
    return self._engine.slots

  @property
  def codes_drawn(self) -> int:
    return self._engine.codes_drawn

  def start(self) -> None:
    self._thread.start()

  def submit(self, request: Request) -> RequestHandle:
    handle = RequestHandle(self, request)
    with self._state:
      if not self.free_places:
        raise QueueFull
      if not self.alive:
        handle.tell(WorkerDied("it takes no requests"))
      else:
        self._waiting.append(handle)
        self._state.notify()
    return handle

  def cancel(self, handle: RequestHandle) -> None:
    """Gives up a request, wherever it is; its rows are free after the chunk."""
    with self._state:
      self._rendering.discard(handle)
      if handle in self._waiting:
        self._waiting.remove(handle)
      elif handle.request in self._drawing and handle not in self._cancelled:
        self._cancelled.append(handle)

  def stop(self) -> None:
    with self._state:
      self._stopping = True
      self._state.notify()
    if self._thread.is_alive():
      self._thread.join()
    self._renderer.shutdown(cancel_futures=True)
    for handle in self._rendering:
      handle.tell(WorkerDied(STOPS))
    self._rendering.clear()

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
      self._die(WorkerDied(STOPS))

  def _wait(self) -> bool:
    """Until there is something to do; False at the end."""
    with self._state:
      while not (self._stopping or self._waiting or self._drawing):
        self._state.wait()
      return not self._stopping

  def _turn(self) -> None:
    """Lets requests leave and join, and draws a chunk for all."""
    with self._state:
      gone, self._cancelled = self._cancelled, []
      for handle in gone:
        del self._drawing[handle.request]
    for handle in gone:
      self._engine.leave(handle.request)
    while self._admit():
      pass
    for request in self._engine.advance():
      handle = self._drawing[request]
      codes = np.array(request.codes, np.int32)
      if len(codes) < self._engine.config.image_tokens:
        handle.tell(Progress(codes))
        continue
      with self._state:
        del self._drawing[request]
        if handle in self._cancelled:
          self._cancelled.remove(handle)
          continue
        self._rendering.add(handle)
      self._renderer.submit(self._finish, handle, codes)

  def _admit(self) -> bool:
    """Lets the first in the queue join. The lock is free while the device works."""
    with self._state:
      first = self._waiting[0] if self._waiting else None
    if first is None or not self._engine.join(first.request):
      return False
    with self._state:
      if first in self._waiting:
        self._waiting.remove(first)
        self._drawing[first.request] = first
      else:  # given up meanwhile
        self._engine.leave(first.request)
    return True

  def _finish(self, handle: RequestHandle, codes: np.ndarray) -> None:
    """Renders codes, in the thread beside the one that draws."""
    if handle not in self._rendering:  # given up since
      return
    try:
      event = Finished(self._render(codes[None])[0], codes)
    except Exception as error:
      logging.exception("the tokenizer has failed")
      event = WorkerDied(str(error))
    with self._state:
      self._rendering.discard(handle)  # first: who hears of it may ask again at once
    handle.tell(event)

  def _die(self, error: WorkerDied) -> None:
    with self._state:
      self._dead = True
      for handle in [*self._waiting, *self._drawing.values()]:
        handle.tell(error)
      self._waiting.clear()
      self._drawing.clear()
