"""From a request to pictures: admission, deadline, and what is counted on the way."""

import asyncio
from collections.abc import AsyncIterator
import dataclasses
import math
import secrets
import time

from anyio import to_thread
import numpy as np

from llamagen_jax.serving.metrics import Metrics
from llamagen_jax.serving.protocol import Drawer, Finished, Handle, Progress, QueueFull
from llamagen_jax.serving.refusal import Refusal
from llamagen_jax.serving.schema import LARGEST_SEED, ImageRequest
from llamagen_jax.serving.studio import Studio

SMOOTHING = 0.1  # share of a new request in the mean time that one takes
WARM_UP_SECONDS = 10  # to try again after, when the programs are not compiled yet


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  pictures: int  # of one request
  seconds: float  # until it is done
  body_bytes: int


class Service:
  """Admits requests to one drawer. Lives in one event loop."""

  def __init__(self, studio: Studio, drawer: Drawer, limits: Limits):
    self.studio, self.drawer, self.limits = studio, drawer, limits
    self.metrics = Metrics()
    self.draining = self._warm = False
    self._mean_seconds = 1.0
    self.metrics.watch([
      ("queue_length", "pictures that wait for a slot", lambda: drawer.queued),
      ("slots_busy", "guidance pairs in use", lambda: drawer.busy_slots),
      ("slots", "guidance pairs", lambda: drawer.slots),
      ("ready", "1 when everything is compiled", lambda: self.ready),
    ])  # fmt: skip
    self.metrics.count("codes", "codes of all requests", lambda: drawer.codes_drawn)

  @property
  def ready(self) -> bool:
    """Whether requests are welcome."""
    return self._warm and self.drawer.ready and not self.draining

  @property
  def alive(self) -> bool:
    return self.drawer.alive

  async def warm_up(self) -> None:
    """Compiles what runs on this side; requests are refused until then."""
    await to_thread.run_sync(self.studio.warm_up)
    self._warm = True

  async def admit(self, body: ImageRequest) -> "Drawing":
    """Queues every picture of a request, or none.

    Raises:
      Refusal: 503 before the start and after the end, 429 when the queue is full,
        400 and 404 for what the model cannot draw.
    """
    started = time.monotonic()
    count = (body.n or 1) * len(body.class_labels or [0])
    if count > self.limits.pictures:
      message = f"{count} pictures: this server draws at most {self.limits.pictures}."
      raise Refusal(400, message, code="invalid_value", param="n")
    self._check_open()
    self._check_places(count)
    seed = secrets.randbelow(LARGEST_SEED + 1) if body.seed is None else body.seed
    requests = await to_thread.run_sync(self.studio.requests, body, seed)
    self._check_places(count)
    handles: list[Handle] = []
    try:
      for request in requests:
        handles.append(self.drawer.submit(request))
    except QueueFull:
      for handle in handles:
        handle.cancel()
      self._reject_full(count)
    return Drawing(self, body, seed, handles, started)

  def done(self, seconds: float) -> None:
    """A request took so long."""
    self.metrics.latency.observe(seconds)
    self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)

  def _check_open(self) -> None:
    if self.draining:
      self.metrics.rejected.labels("draining").inc()
      raise Refusal(503, "The server is shutting down.", code="draining", retry_after=1)
    if not self.ready:
      self.metrics.rejected.labels("not_ready").inc()
      what = "The server is starting." if self.alive else "The engine has died."
      raise Refusal(503, what, code="not_ready", retry_after=WARM_UP_SECONDS)

  def _check_places(self, count: int) -> None:
    if self.drawer.free_places < count:
      self._reject_full(count)

  def _reject_full(self, count: int) -> None:
    self.metrics.rejected.labels("queue_full").inc()
    # Little's law: the server finishes as many a second as it holds per mean time.
    held = self.drawer.queued + self.drawer.slots
    seconds = max(1, math.ceil(self._mean_seconds * count / held))
    message = f"The queue is full; try again in {seconds} s."
    raise Refusal(429, message, code="rate_limit_exceeded", retry_after=seconds)


class Drawing:
  """The pictures of one admitted request. Whoever holds it must `close` it."""

  def __init__(
    self,
    service: Service,
    body: ImageRequest,
    seed: int,
    handles: list[Handle],
    started: float,
  ):
    self.body, self.seed = body, seed
    self._service, self._handles, self._started = service, handles, started
    self._missing = len(handles)
    self._followers: list[asyncio.Task] = []
    self._reason = "disconnect"

  async def pictures(self) -> list[np.ndarray]:
    """All of them, uint8 [side, side, 3]. Raises what `news` raises."""
    pictures = {}
    async for index, event in self.news():
      if isinstance(event, Finished):
        pictures[index] = event.picture
    return [pictures[i] for i in sorted(pictures)]

  async def news(self) -> AsyncIterator[tuple[int, Progress | Finished]]:
    """(number of a picture, what happened to it), until all are finished.

    Raises:
      Refusal: 503 after the deadline, or when the drawer has died.
    """
    news: asyncio.Queue = asyncio.Queue()
    self._followers = [
      asyncio.create_task(_follow(i, handle, news))
      for i, handle in enumerate(self._handles)
    ]
    limit = self._service.limits.seconds
    while self._missing:
      left = limit - (time.monotonic() - self._started)
      try:
        index, event = await asyncio.wait_for(news.get(), max(0.0, left))
      except TimeoutError:
        self._reason = "deadline"
        message = f"The request was not done after {limit:g} s."
        raise Refusal(503, message, code="deadline_exceeded", retry_after=1) from None
      if isinstance(event, Exception):
        raise Refusal(503, "The engine has died.", code="engine_died") from event
      if isinstance(event, Finished):
        self._missing -= 1
        self._service.metrics.pictures.inc()
        if not self._missing:
          self._service.done(time.monotonic() - self._started)
      yield index, event

  def first_partial(self) -> None:
    """Notes that the first partial picture is on its way."""
    self._service.metrics.first.observe(time.monotonic() - self._started)

  def close(self) -> None:
    """Gives up what is not finished, and its slots."""
    for task in self._followers:
      task.cancel()
    for handle in self._handles:
      handle.cancel()
    if self._missing:
      self._service.metrics.cancelled.labels(self._reason).inc()
    self._missing, self._handles = 0, []


async def _follow(index: int, handle: Handle, news: asyncio.Queue) -> None:
  try:
    async for event in handle:
      news.put_nowait((index, event))
  except Exception as error:  # WorkerDied, or a bug that must not look like silence
    news.put_nowait((index, error))
