"""A server on a socket of its own, with a fake engine under the real worker."""

import contextlib
import dataclasses
import socket
import threading
import time

import httpx
import jax

from llamagen_jax import GPTConfig, SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.serving.api import make_app
from llamagen_jax.serving.http_server import Server, Timeouts
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.service import Limits, Service
from llamagen_jax.serving.worker import Worker
from llamagen_jax.sides import Sides
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny
from tests.serving.fake import VOCABULARY, FakeEngine

# No wait is shorter than a machine is slow; no connection outlives its request.
HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
KEY = "sk-test"
NAMES = ("tench", "goldfish", "great white shark", "tiger shark")
LIMITS = Limits(images=4, seconds=300.0, body_bytes=100_000)


def tiny_model(name: str = "tiny", grid: Sides = 4) -> ImageModel:
  """Images of 16 codes, 2x2 pixels each; the transformer has no parameters."""
  config = GPTConfig(
    1, 2, 16, grid=grid, vocab_size=VOCABULARY, num_classes=4, ffn_multiple=16
  )
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  tokenizer = bundle.Tokenizer(tiny.TOKENIZER, params, "tiny")
  sampling = SamplingConfig(guidance_scale=2.0)  # so that each takes a whole slot
  gpt = bundle.Transformer(config, None, sampling, "tiny", NAMES)
  return ImageModel(name, gpt, tokenizer)


@dataclasses.dataclass
class Live:
  url: str
  service: Service
  engine: FakeEngine  # of the first model
  worker: Worker
  port: int
  server: Server

  def is_idle(self) -> bool:
    return not self.worker.queued and not self.worker.busy_slots


@contextlib.contextmanager
def serve(
  *models: ImageModel,
  limits=LIMITS,
  queue=4,
  key="",
  mount=None,
  timeouts=Timeouts(drain=30.0),
  wait=True,
  app=None,
  **fake,
):
  """Yields a `Live` server.

  Args:
    models: each with a fake engine of its own, made with the rest as its settings.
    limits: of the service.
    queue: places for requests that wait.
    key: that requests need.
    mount: adds a demo to the app.
    timeouts: of the connections.
    wait: until the server is ready.
    app: more arguments of `make_app`.
    **fake: arguments of `FakeEngine`.
  """
  engines = [FakeEngine(model.gpt.config.image_tokens, **fake) for model in models]
  workers = {
    model: Worker(engine, model.render, queue)
    for model, engine in zip(models, engines, strict=True)
  }
  service = Service(workers, limits)
  app = make_app(service, api_key=key, **(app or {}))
  if mount is not None:
    mount(app, service, key)
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    server = Server(app, timeouts)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: server.started and (service.ready or not wait), 600)
    port = listening.getsockname()[1]
    worker = next(iter(workers.values()))
    try:
      yield Live(f"http://127.0.0.1:{port}", service, engines[0], worker, port, server)
    finally:
      server.should_exit = True
      thread.join(120)


def wait_until(condition, seconds: float = 120.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.005)
