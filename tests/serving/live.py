"""A server on a socket of its own, with a fake backend unless another one is given."""

import contextlib
import dataclasses
import socket
import threading
import time

import jax
import uvicorn

from llamagen_jax import GPTConfig, SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.serving.api import make_app
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.service import Limits, Service
from llamagen_jax.serving.store import Store
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny
from tests.serving.fake import VOCABULARY, FakeDrawer

KEY = "sk-test"
NAMES = ("tench", "goldfish", "great white shark", "tiger shark")
LIMITS = Limits(images=4, seconds=20.0, body_bytes=100_000)


def tiny_studio() -> ImageModel:
  """Images of 8x8 pixels and 4x4 codes; the transformer has no parameters."""
  config = GPTConfig(
    1, 2, 16, grid=4, vocab_size=VOCABULARY, num_classes=4, ffn_multiple=16
  )
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  tokenizer = bundle.Tokenizer(tiny.TOKENIZER, params, "tiny")
  gpt = bundle.Transformer(config, None, SamplingConfig(), "tiny", NAMES)
  return ImageModel("tiny", gpt, tokenizer)


@dataclasses.dataclass
class Live:
  url: str
  service: Service
  backend: FakeDrawer


@contextlib.contextmanager
def serve(
  image_model: ImageModel, *, limits=LIMITS, folder=None, key="", mount=None, **fake
):
  """Yields a `Live` server; the fake's settings are keywords."""
  backend = FakeDrawer(image_model.render, image_model.gpt.config.image_tokens, **fake)
  service = Service(image_model, backend, limits)
  app = make_app(service, Store(folder), key)
  if mount is not None:
    mount(app, service, key)
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not (server.started and service.ready):
      time.sleep(0.01)
    try:
      yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", service, backend)
    finally:
      server.should_exit = True
      thread.join(10)


def wait_until(condition, seconds: float = 5.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.005)
