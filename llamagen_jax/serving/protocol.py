"""What the HTTP side asks of the side that draws; `worker.Worker` is one."""

from collections.abc import AsyncIterator
import dataclasses
from typing import Protocol

import numpy as np

from llamagen_jax.serving.request import Request


class QueueFull(Exception):
  """There is no place for a request; try again later."""


class WorkerDied(Exception):
  """The thread that draws is gone, and with it every request."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """Codes of an image that are drawn so far, int32 [t] in raster order."""

  codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Finished:
  """An image, uint8 [H, W, 3], and all its codes, int32 [T]."""

  image: np.ndarray
  codes: np.ndarray


class RequestHandle(Protocol):
  """A request on its way. Iterating over it, in one event loop, waits for events."""

  def __aiter__(self) -> AsyncIterator[Progress | Finished]:
    """Ends after `Finished`; raises `WorkerDied`. May skip progress, never the end."""

  def cancel(self) -> None:
    """Frees place and slot within a chunk; harmless after the end."""


class Backend(Protocol):
  """Draws requests in a thread of its own."""

  @property
  def ready(self) -> bool:
    """Everything is compiled, and the thread lives."""

  @property
  def alive(self) -> bool:
    """The thread lives, if only to compile."""

  @property
  def queued(self) -> int:
    """Requests that wait for a slot."""

  @property
  def free_places(self) -> int:
    """Requests that `submit` takes before it raises `QueueFull`."""

  @property
  def busy_slots(self) -> float:
    """Slots in use; a slot of which one row is used counts half."""

  @property
  def slots(self) -> int: ...

  @property
  def codes_drawn(self) -> int:
    """Codes of all requests since the start."""

  def start(self) -> None:
    """Starts the thread, which compiles first."""

  def submit(self, request: Request) -> RequestHandle:
    """Queues a request, from the event loop that will follow it; or `QueueFull`."""

  def stop(self) -> None:
    """Ends the thread after the chunk it is in."""
