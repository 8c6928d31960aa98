"""From a request to images: admission, deadline, and what is counted on the way."""

import asyncio
from collections.abc import AsyncIterator
import dataclasses
import math
import secrets
import time

from anyio import to_thread
import numpy as np

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.metrics import Metrics
from llamagen_jax.serving.protocol import (
  Backend,
  Finished,
  Progress,
  QueueFull,
  RequestHandle,
)
from llamagen_jax.serving.schema import LARGEST_SEED, ImageRequest

SMOOTHING = 0.1  # share of a new request in the mean time that one takes
WARM_UP_SECONDS = 10  # to try again after, when the programs are not compiled yet


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  images: int  # of one request
  seconds: float  # until it is done
  body_bytes: int


class Service:
  """Admits requests to one backend. Lives in one event loop."""

  def __init__(self, image_model: ImageModel, backend: Backend, limits: Limits):
    self.image_model, self.backend, self.limits = image_model, backend, limits
    self.metrics = Metrics()
    self.draining = self._warm = False
    self._mean_seconds = 1.0
    self.metrics.watch([
      ("queue_length", "images that wait for a slot", lambda: backend.queued),
      ("slots_busy", "guidance pairs in use", lambda: backend.busy_slots),
      ("slots", "guidance pairs", lambda: backend.slots),
      ("ready", "1 when everything is compiled", lambda: self.ready),
    ])  # fmt: skip
    self.metrics.count("codes", "codes of all requests", lambda: backend.codes_drawn)

  @property
  def ready(self) -> bool:
    """Whether requests are welcome."""
    return self._warm and self.backend.ready and not self.draining

  @property
  def alive(self) -> bool:
    return self.backend.alive

  async def warm_up(self) -> None:
    """Compiles what runs on this side; requests are refused until then."""
    await to_thread.run_sync(self.image_model.warm_up)
    self._warm = True

  async def admit(self, body: ImageRequest) -> "ActiveRequest":
    """Queues every image of a request, or none.

    Raises:
      APIError: 503 before the start and after the end, 429 when the queue is full,
        400 and 404 for what the model cannot draw.
    """
    started = time.monotonic()
    count = (body.n or 1) * len(body.class_labels or [0])
    if count > self.limits.images:
      message = f"{count} images: this server draws at most {self.limits.images}."
      raise APIError(400, message, code="invalid_value", param="n")
    self._check_open()
    self._check_places(count)
    seed = secrets.randbelow(LARGEST_SEED + 1) if body.seed is None else body.seed
    requests = await to_thread.run_sync(self.image_model.requests, body, seed)
    self._check_places(count)
    handles: list[RequestHandle] = []
    try:
      for request in requests:
        handles.append(self.backend.submit(request))
    except QueueFull:
      for handle in handles:
        handle.cancel()
      self._reject_full(count)
    return ActiveRequest(self, body, seed, handles, started)

  def done(self, seconds: float) -> None:
    """A request took so long."""
    self.metrics.latency.observe(seconds)
    self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)

  def _check_open(self) -> None:
    if self.draining:
      self.metrics.rejected.labels("draining").inc()
      raise APIError(
        503, "The server is shutting down.", code="draining", retry_after=1
      )
    if not self.ready:
      self.metrics.rejected.labels("not_ready").inc()
      what = "The server is starting." if self.alive else "The engine has died."
      raise APIError(503, what, code="not_ready", retry_after=WARM_UP_SECONDS)

  def _check_places(self, count: int) -> None:
    if self.backend.free_places < count:
      self._reject_full(count)

  def _reject_full(self, count: int) -> None:
    self.metrics.rejected.labels("queue_full").inc()
    # Little's law: the server finishes as many a second as it holds per mean time.
    held = self.backend.queued + self.backend.slots
    seconds = max(1, math.ceil(self._mean_seconds * count / held))
    message = f"The queue is full; try again in {seconds} s."
    raise APIError(429, message, code="rate_limit_exceeded", retry_after=seconds)


class ActiveRequest:
  """The images of one admitted request. Whoever holds it must `close` it."""

  def __init__(
    self,
    service: Service,
    body: ImageRequest,
    seed: int,
    handles: list[RequestHandle],
    started: float,
  ):
    self.body, self.seed = body, seed
    self._service, self._handles, self._started = service, handles, started
    self._missing = len(handles)
    self._followers: list[asyncio.Task] = []
    self._reason = "disconnect"

  async def images(self) -> list[np.ndarray]:
    """All of them, uint8 [side, side, 3]. Raises what `events` raises."""
    images = {}
    async for index, event in self.events():
      if isinstance(event, Finished):
        images[index] = event.image
    return [images[i] for i in sorted(images)]

  async def events(self) -> AsyncIterator[tuple[int, Progress | Finished]]:
    """(number of an image, what happened to it), until all are finished.

    Raises:
      APIError: 503 after the deadline, or when the backend has died.
    """
    events: asyncio.Queue = asyncio.Queue()
    self._followers = [
      asyncio.create_task(_follow(i, handle, events))
      for i, handle in enumerate(self._handles)
    ]
    limit = self._service.limits.seconds
    while self._missing:
      left = limit - (time.monotonic() - self._started)
      try:
        index, event = await asyncio.wait_for(events.get(), max(0.0, left))
      except TimeoutError:
        self._reason = "deadline"
        message = f"The request was not done after {limit:g} s."
        raise APIError(503, message, code="deadline_exceeded", retry_after=1) from None
      if isinstance(event, Exception):
        raise APIError(503, "The engine has died.", code="engine_died") from event
      if isinstance(event, Finished):
        self._missing -= 1
        self._service.metrics.images.inc()
        if not self._missing:
          self._service.done(time.monotonic() - self._started)
      yield index, event

  def first_partial(self) -> None:
    """Notes that the first partial image is on its way."""
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


async def _follow(index: int, handle: RequestHandle, events: asyncio.Queue) -> None:
  try:
    async for event in handle:
      events.put_nowait((index, event))
  except Exception as error:  # WorkerDied, or a bug that must not look like silence
    events.put_nowait((index, error))
