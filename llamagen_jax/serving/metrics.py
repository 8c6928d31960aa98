"""The numbers at /metrics. Rates are such as `rate(llamagen_images_total[1m])`."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  Metric,
  generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from llamagen_jax.serving.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
  """Counters of one server, in a registry of its own."""

  def __init__(self, workers: Mapping[str, Worker]):
    """Makes the counters of a server with the workers of these models."""
    self.registry = CollectorRegistry()
    self.registry.register(_WorkerState(workers))
    own = {"namespace": "llamagen", "registry": self.registry}
    self.responses = Counter(
      "responses", "by path and status", ["path", "status"], **own
    )
    self.images = Counter("images", "finished images", ["model"], **own)
    self.forwards = Counter("forwards", "of finished images", ["model"], **own)
    self.rejected = Counter("rejected", "requests turned away", ["reason"], **own)
    self.cancelled = Counter("cancelled", "requests given up", ["reason"], **own)
    self.latency = Histogram(
      "request_seconds", "from request to last image", buckets=SECONDS, **own
    )
    self.first = Histogram(
      "first_partial_seconds", "to the first partial image", buckets=SECONDS, **own
    )
    for model in workers:
      self.images.labels(model)
      self.forwards.labels(model)
    for reason in ("queue_full", "not_ready", "draining"):
      self.rejected.labels(reason)
    for reason in ("disconnect", "deadline", "engine_died"):
      self.cancelled.labels(reason)

  def watch_ready(self, read: Callable[[], bool]) -> None:
    """Adds the gauge of readiness, which is read at every scrape."""
    text = "1 when everything is compiled"
    gauge = Gauge("ready", text, namespace="llamagen", registry=self.registry)
    gauge.set_function(read)

  def text(self) -> bytes:
    return generate_latest(self.registry)


class _WorkerState(Collector):
  """The state of every model's worker, read at every scrape."""

  def __init__(self, workers: Mapping[str, Worker]):
    self._workers = workers

  def collect(self) -> Iterable[Metric]:
    gauges = {
      "queue_length": ("images that wait for a slot", lambda w: w.queued),
      "slots_busy": ("guidance pairs in use", lambda w: w.busy_slots),
      "slots": ("guidance pairs", lambda w: w.slots),
    }
    for name, (text, read) in gauges.items():
      family = GaugeMetricFamily(f"llamagen_{name}", text, labels=["model"])
      for model, worker in self._workers.items():
        family.add_metric([model], read(worker))
      yield family
    codes = CounterMetricFamily("llamagen_codes", "of all requests", labels=["model"])
    for model, worker in self._workers.items():
      codes.add_metric([model], worker.codes_sampled)
    yield codes
