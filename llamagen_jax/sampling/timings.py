"""How long sampling takes, compiling apart from computing."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import math
import time

import jax
import numpy as np


@dataclasses.dataclass
class Timings:
  """Seconds of every stage of sampling; filled while images are sampled."""

  compile: float = 0.0  # tracing and compiling, of both models
  decode: float = 0.0  # codes, by the transformer
  tokenizer: float = 0.0  # codes to images
  forwards: list[int] = dataclasses.field(default_factory=list)  # of every image here

  def __str__(self) -> str:
    total = self.compile + self.decode + self.tokenizer
    return (
      f"{total:.1f} s: compile {self.compile:.1f}, decode {self.decode:.1f},"
      f" tokenizer {self.tokenizer:.1f}; {np.mean(self.forwards):.1f} forwards an image"
    )

  @contextlib.contextmanager
  def clock(self, field: str) -> Iterator[None]:
    """Adds the time of its body to a field, less the time spent compiling in it."""
    started, spans = time.perf_counter(), []

    def listen(event: str, seconds: float, **_):
      if event.startswith("/jax/core/compile/"):
        now = time.perf_counter()
        spans.append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      yield
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
      compiled = covered(spans)
      elapsed = time.perf_counter() - started
      self.compile += compiled
      setattr(self, field, getattr(self, field) + elapsed - compiled)


def covered(spans: Sequence[tuple[float, float]]) -> float:
  """Returns the length that spans of time cover together: traces are nested."""
  total, end = 0.0, -math.inf
  for first, last in sorted(spans):
    total += max(0.0, last - max(first, end))
    end = max(end, last)
  return total
