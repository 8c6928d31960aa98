"""An engine without a model, whose codes are a function of the request's key."""

import threading
import time
import types

import numpy as np

from llamagen_jax.serving.request import Request

VOCABULARY = 16


def codes_of(request: Request, count: int) -> np.ndarray:
  """Returns the codes that the fake generates for a request, int32 [count]."""
  codes = np.random.default_rng(request.key).integers(0, VOCABULARY, count, np.int32)
  if request.known is None:
    return codes
  return np.where(request.is_known[:count], request.known[:count], codes)


class FakeEngine:
  """Slots that move `chunk` codes a tick; each holds one image.

  The worker around it is the real one.
  """

  def __init__(self, image_tokens: int, *, slots=2, tick=0.002, chunk=1, compiled=None):
    self.config = types.SimpleNamespace(image_tokens=image_tokens)
    self.slots, self.tick, self.chunk = slots, tick, chunk
    self.codes_sampled = 0
    self.last = image_tokens  # no image gets beyond this code
    self._compiled: threading.Event | None = compiled  # warming up waits for it
    self.requests: list[Request] = []  # all that ever joined
    self.error: Exception | None = None  # raised by the next tick
    self._running: list[Request] = []

  @property
  def busy_rows(self) -> int:
    return 2 * len(self._running)

  @property
  def idle(self) -> bool:
    return not self._running

  def warm_up(self) -> None:
    if self._compiled:
      assert self._compiled.wait(60)

  def join(self, request: Request) -> bool:
    if len(self._running) == self.slots:
      return False
    self.requests.append(request)
    self._running.append(request)
    return True

  def leave(self, request: Request) -> None:
    if request in self._running:
      self._running.remove(request)

  def advance(self) -> list[Request]:
    time.sleep(self.tick)
    if self.error:
      raise self.error
    moved = [request for request in self._running if len(request.codes) < self.last]
    for request in moved:
      end = min(self.last, len(request.codes) + self.chunk)
      self.codes_sampled += end - len(request.codes)
      request.forwards += 1
      request.codes = codes_of(request, self.config.image_tokens)[:end].tolist()
      if end == self.config.image_tokens:
        self._running.remove(request)
    return moved
