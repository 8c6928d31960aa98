"""From a request to images: admission, deadline, and counting."""

import asyncio
from collections.abc import AsyncIterator, Mapping
import dataclasses
import math
import random
import secrets
import time

from absl import logging
from anyio import CapacityLimiter, to_thread
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.metrics import Metrics
from llamagen_jax.serving.schema import RANDOM_SEED, ImageRequest, Style
from llamagen_jax.serving.sizes import Size, choose_size, text
from llamagen_jax.serving.upload import Upload, open_canvas
from llamagen_jax.serving.worker import (
  Finished,
  Progress,
  QueueFull,
  RequestHandle,
  Worker,
)

UPLOADS_AT_ONCE = 2  # that are decoded; others wait, so that memory is bounded
WARM_UP_SECONDS = 10  # to try again after, when the programs are not compiled yet
# OpenAI's names, which clients send unless they are told another one.
OPENAI_NAMES = ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for, and how its fields are read."""

  images: int = 10  # of one request
  seconds: float = 300.0  # until it is done
  body_bytes: int = 1_000_000
  upload_bytes: int = 20_000_000  # of a body with images; 0 = there are no edits
  aliases: tuple[str, ...] = OPENAI_NAMES  # of the first model
  any_model: bool = False  # every unknown name means the first model
  strict: bool = False  # refuse unknown fields instead of ignoring them
  size_policy: str = "nearest"  # one of sizes.POLICIES


class Service:
  """Admits requests to the workers of its models. Lives in one event loop."""

  def __init__(self, workers: Mapping[ImageModel, Worker], limits: Limits):
    """Makes the service of one model or more; the first one is the default.

    Models of the same name are one model at several sizes, its own size first.

    Raises:
      UserError: two models of the same name and size.
    """
    self.workers, self.limits = dict(workers), limits
    self._by_size: dict[str, dict[Size, ImageModel]] = {}
    for model in workers:
      self._by_size.setdefault(model.name, {})[model.size] = model
    if sum(map(len, self._by_size.values())) < len(self.workers):
      names = ", ".join(model.name for model in workers)
      raise UserError(f"models {names}: expected names that differ (--name)")
    self.models = {n: next(iter(sizes.values())) for n, sizes in self._by_size.items()}
    self.metrics = Metrics({self.label(m): worker for m, worker in workers.items()})
    self.metrics.watch_ready(lambda: self.ready)
    self.draining = self._warm = self._failed = False
    self._opening = CapacityLimiter(UPLOADS_AT_ONCE)

  @property
  def default_model(self) -> ImageModel:
    return next(iter(self.workers))

  @property
  def ready(self) -> bool:
    """Whether everything is compiled, and nobody has asked the server to stop."""
    ready = all(worker.ready for worker in self.workers.values())
    return self._warm and ready and not self.draining

  @property
  def alive(self) -> bool:
    return not self._failed and all(worker.alive for worker in self.workers.values())

  def start(self) -> None:
    """Starts the workers, which compile first."""
    for worker in self.workers.values():
      worker.start()

  def stop(self) -> None:
    """Ends the workers; blocks until they have."""
    for worker in self.workers.values():
      worker.stop()

  async def warm_up(self) -> None:
    """Compiles the programs beside the engines'; requests are refused until then."""
    try:
      for model in self.workers:
        await to_thread.run_sync(model.warm_up, bool(self.limits.upload_bytes))
    except Exception:
      logging.exception("the server cannot start")
      self._failed = True
    else:
      self._warm = True

  def model(self, name: str | None) -> ImageModel:
    """Returns the model of that name.

    Raises:
      APIError: 404, which names those that exist.
    """
    if name in self.models:
      return self.models[name]
    if name is None or name in self.limits.aliases or self.limits.any_model:
      return self.default_model
    known = ", ".join(f"'{known}'" for known in self.models)
    message = f"The model '{name[:60]}' does not exist; this server has {known}."
    raise APIError(404, message, code="model_not_found", param="model")

  def sizes(self, model: ImageModel) -> list[Size]:
    """Returns the sizes that a model generates, the default first."""
    return list(self._by_size[model.name])

  def label(self, model: ImageModel) -> str:
    """Returns the name of a model's worker in the metrics."""
    if model is self.models[model.name]:
      return model.name
    return f"{model.name} {text(model.size)}"

  def most_images(self, model: ImageModel) -> int:
    """Images that one request may ask of a model."""
    return min(self.limits.images, self.workers[model].capacity)

  async def admit(
    self, body: ImageRequest, warnings: list[str], upload: Upload | None = None
  ) -> "ActiveRequest":
    """Queues every image of a request, or none.

    An edit has an upload.

    Raises:
      APIError: 503 before the start and after the end, 429 when the queue is full,
        400 and 404 for a field that the model cannot serve.
    """
    started = time.monotonic()
    model = self.model(body.model)
    generated, size, resized = choose_size(
      body.size, self.sizes(model), self.limits.size_policy
    )
    model = self._by_size[model.name][generated]
    if body.count > self.most_images(model):
      message = f"{body.count} images: expected 1 .. {self.most_images(model)}."
      raise APIError(400, message, code="invalid_value", param="n")
    if body.partial_images and not body.stream:
      message = "'partial_images' goes with 'stream': true."
      raise APIError(400, message, code="invalid_value", param="partial_images")
    self._check_open()
    worker = self.workers[model]
    if worker.free_places < body.count:
      self._refuse_full(worker, body.count)
    random_seed = body.seed is None or body.seed == RANDOM_SEED
    seed = secrets.randbelow(2**31) if random_seed else body.seed
    canvas = None
    if upload is not None:
      canvas, fitted = await to_thread.run_sync(
        open_canvas, upload, model.size, body.settings.keeps_some,
        limiter=self._opening,
      )  # fmt: skip
      resized = [*resized, *fitted]
    requests = await to_thread.run_sync(model.requests, body, seed, canvas)
    self._check_open()
    try:
      handles = worker.submit(requests)
    except QueueFull:
      self._refuse_full(worker, body.count)
    style = Style(
      model=model.name, output_format=body.output_format or "png", size=text(size)
    )
    warnings = [*warnings, *resized, *model.warnings(body)]
    return ActiveRequest(
      service=self, model=model, body=body, seed=seed, size=size, style=style,
      warnings=warnings or None, handles=handles, started=started,
    )  # fmt: skip

  def _check_open(self) -> None:
    if self.draining:
      self.metrics.rejected.labels("draining").inc()
      message = "The server is shutting down."
      raise APIError(503, message, code="draining", retry_after=1)
    if not self.ready:
      self.metrics.rejected.labels("not_ready").inc()
      message = "The server is starting." if self.alive else "The engine has died."
      raise APIError(503, message, code="not_ready", retry_after=WARM_UP_SECONDS)

  def _refuse_full(self, worker: Worker, count: int) -> None:
    self.metrics.rejected.labels("queue_full").inc()
    seconds = retry_seconds(worker, count)
    message = f"The queue is full; try again in {seconds} s."
    raise APIError(429, message, code="rate_limit_exceeded", retry_after=seconds)


def retry_seconds(worker: Worker, count: int) -> int:
  """Returns the seconds until `count` images more can be expected to find a place.

  That is the time in which the slots finish what waits and those images; spread over
  as much again, so that the clients of a burst do not come back together.
  """
  waves = (worker.queued + count) / worker.slots
  seconds = max(1, math.ceil(worker.mean_seconds * waves))
  return seconds + random.randint(0, seconds)


@dataclasses.dataclass(eq=False)
class ActiveRequest:
  """The images of one admitted request. Whoever holds it must `close` it."""

  service: Service
  model: ImageModel
  body: ImageRequest
  seed: int
  size: tuple[int, int]  # of the images in the response
  style: Style
  warnings: list[str] | None
  handles: list[RequestHandle]
  started: float  # by time.monotonic

  def __post_init__(self):
    self.requests = [handle.request for handle in self.handles]
    self._missing = len(self.handles)
    self._events: asyncio.Queue = asyncio.Queue()
    self._followers: list[asyncio.Task] = []
    self._reason = "disconnect"

  async def images(self) -> list[np.ndarray]:
    """Returns all images, uint8 [H, W, 3]. Raises what `events` raises."""
    images = {}
    async for index, event in self.events():
      if isinstance(event, Finished):
        images[index] = event.image
    return [images[i] for i in sorted(images)]

  async def events(self) -> AsyncIterator[tuple[int, Progress | Finished]]:
    """Yields (number of an image, event of that image).

    Ends when all images are finished, or the request is closed.

    Raises:
      APIError: 503 after the deadline, or when the engine has died.
    """
    self._followers = [
      asyncio.create_task(_follow(i, handle, self._events))
      for i, handle in enumerate(self.handles)
    ]
    limit = self.service.limits.seconds
    while self._missing:
      left = limit - (time.monotonic() - self.started)
      try:
        index, event = await asyncio.wait_for(self._events.get(), max(0.0, left))
      except TimeoutError:
        self._reason = "deadline"
        message = f"The request was not done after {limit:g} s."
        raise APIError(503, message, code="deadline_exceeded", retry_after=1) from None
      if event is None:
        return
      if isinstance(event, Exception):
        self._reason = "engine_died"
        raise APIError(503, "The engine has died.", code="engine_died") from event
      if isinstance(event, Finished):
        self._missing -= 1
        label, metrics = self.service.label(self.model), self.service.metrics
        metrics.images.labels(label).inc()
        metrics.forwards.labels(label).inc(self.requests[index].forwards)
        if not self._missing:
          self.service.metrics.latency.observe(time.monotonic() - self.started)
      yield index, event

  def first_partial(self) -> None:
    """Notes that the first partial image is on its way."""
    self.service.metrics.first.observe(time.monotonic() - self.started)

  def close(self) -> None:
    """Gives up unfinished images, and frees their slots."""
    for task in self._followers:
      task.cancel()
    for handle in self.handles:
      handle.cancel()
    if self._missing:
      self.service.metrics.cancelled.labels(self._reason).inc()
    self._missing, self.handles = 0, []
    self._events.put_nowait((None, None))  # wakes whoever waits for the next one


async def _follow(index: int, handle: RequestHandle, events: asyncio.Queue) -> None:
  try:
    async for event in handle:
      events.put_nowait((index, event))
  except Exception as error:  # WorkerDied, or a bug that must not look like silence
    events.put_nowait((index, error))
