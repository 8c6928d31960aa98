"""What /metrics tells Prometheus. Rates are `rate(llamagen_images_total[1m])`."""

from collections.abc import Callable, Iterable

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
  """Counters of one server, in a registry of its own."""

  def __init__(self):
    self.registry = CollectorRegistry()
    own = {"namespace": "llamagen", "registry": self.registry}
    self.responses = Counter(
      "responses", "by path and status", ["path", "status"], **own
    )
    self.images = Counter("images", "finished images", **own)
    self.rejected = Counter("rejected", "requests turned away", ["reason"], **own)
    self.cancelled = Counter("cancelled", "requests given up", ["reason"], **own)
    self.latency = Histogram(
      "request_seconds", "from request to last image", buckets=SECONDS, **own
    )
    self.first = Histogram(
      "first_partial_seconds", "to the first partial image", buckets=SECONDS, **own
    )
    for reason in ("queue_full", "not_ready", "draining"):
      self.rejected.labels(reason)
    for reason in ("disconnect", "deadline"):
      self.cancelled.labels(reason)

  def watch(self, gauges: Iterable[tuple[str, str, Callable[[], float]]]) -> None:
    """Adds gauges (name, what it is, function) that are read at every scrape."""
    for name, text, read in gauges:
      gauge = Gauge(name, text, namespace="llamagen", registry=self.registry)
      gauge.set_function(read)

  def count(self, name: str, text: str, read: Callable[[], float]) -> None:
    """Adds a counter that is read at every scrape."""
    self.registry.register(_ReadCounter(f"llamagen_{name}", text, read))

  def text(self) -> bytes:
    return generate_latest(self.registry)


class _ReadCounter(Collector):
  """A counter that is kept elsewhere."""

  def __init__(self, name: str, text: str, read: Callable[[], float]):
    self._name, self._text, self._read = name, text, read

  def collect(self) -> Iterable[CounterMetricFamily]:
    yield CounterMetricFamily(self._name, self._text, self._read())
