"""Serves images over HTTP, by the API of OpenAI, with a web demo.

With LLAMAGEN_API_KEY in the environment, requests need that key.

llamagen serve --workdir=quickstart
llamagen serve --gpt=c2i_L_384 --tokenizer=vq16 --address=0.0.0.0
"""

import asyncio
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket
from typing import Any

from absl import logging
import jax

from llamagen_jax.commands import arguments
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.options import option
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.storage import local_path
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5

SERVER = ("fastapi", "prometheus_client", "uvicorn")  # of the extra `serve`
missing = [name for name in SERVER if importlib.util.find_spec(name) is None]
if missing:
  raise UserError(f"{missing[0]} is missing: pip install 'llamagen_jax[serve]'")

import uvicorn  # noqa: E402

from llamagen_jax.serving.api import make_app  # noqa: E402
from llamagen_jax.serving.engine import CHUNK, Engine  # noqa: E402
from llamagen_jax.serving.image_model import ImageModel  # noqa: E402
from llamagen_jax.serving.service import Limits, Service  # noqa: E402
from llamagen_jax.serving.store import Store  # noqa: E402
from llamagen_jax.serving.worker import Worker  # noqa: E402

KEY = "LLAMAGEN_API_KEY"  # the variable; a flag would be seen in the list of processes
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Models and limits."""

  gpt: str = option("bundle of the transformer", "", unit="FOLDER")
  tokenizer: str = option("bundle of the tokenizer", "", unit="FOLDER")
  t5: str = option("the T5 that the transformer was trained with", "", unit="FOLDER")
  name: str = option("of the model; default: its folder's", "")
  slots: int = option(
    "images generated at once with guidance, twice as many without", 16,
    unit="IMAGES", at_least=1,
  )  # fmt: skip
  chunk: int = option(
    "codes between two moments at which requests join and leave", CHUNK,
    unit="CODES", at_least=1,
  )  # fmt: skip
  queue: int = option(
    "images that may wait, more are answered with 429; default: as many as slots, so"
    " that nobody waits for long", 0, unit="IMAGES", at_least=0,
  )  # fmt: skip
  max_images: int = option("images of one request, at most", 10, at_least=1)
  seconds: float = option("after which a request is given up", 300.0, unit="SECONDS")
  body_bytes: int = option("of a request, at most", 1_000_000, unit="BYTES", at_least=1)
  tensor: int = option("devices that share one model", 1, unit="DEVICES", at_least=1)
  dtype: str = option(
    "of the transformer's activations; default: float32 on CPU, else bfloat16", "",
    choices=("float32", "bfloat16"),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
  """Options of serve."""

  workdir: str = option(
    "of a quickstart, in place of --gpt, --tokenizer and --t5", "", unit="FOLDER"
  )
  address: str = option("address to listen at", LOOPBACK[0])
  port: int = option("0 = any that is free", 8000, at_least=0)
  store: str | None = option("images that get a URL", None, unit="FOLDER")
  demo: bool | None = option(
    "serve the web page at /demo; default: if gradio is installed", None
  )


def main(argv: Sequence[str]) -> None:
  args = _complete(arguments.parse(ServeOptions, "serve", argv, __doc__))
  with _listen(args.address, args.port) as listening:
    key = os.environ.get(KEY, "")
    store = Store(local_path(args.store, "--store") if args.store else None)
    if args.address not in LOOPBACK and not key:
      logging.warning(
        "--address=%s without %s: anybody may use the server", args.address, KEY
      )
    service = make_service(args)
    app = make_app(service, store, key)
    if args.demo:
      from llamagen_jax.serving.demo import PATH, mount_demo

      mount_demo(app, service, key)
    where = f"http://{args.address}:{listening.getsockname()[1]}"
    print(f"{service.image_model.name} at {where}/v1/images/generations", flush=True)
    if args.demo:
      print(f"demo at {where}{PATH}", flush=True)
    _run(app, service, listening)


def make_service(options: Options) -> Service:
  """Loads the models of a server. They compile when its app starts."""
  o = options
  mesh = make_mesh(tensor=o.tensor)
  dtype = o.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  gpt = bundle.load_gpt(o.gpt, mesh, dtype)
  gpt = dataclasses.replace(gpt, params=decoding_params(gpt.config, gpt.params))
  encoder = load_t5(o.t5, dtype=dtype) if o.t5 else None
  image_model = ImageModel(
    o.name or _name(o.gpt), gpt, bundle.load_tokenizer(o.tokenizer), encoder
  )
  worker = Worker(Engine(gpt, o.slots, o.chunk), image_model.render, o.queue or o.slots)
  return Service(image_model, worker, Limits(o.max_images, o.seconds, o.body_bytes))


def _name(folder: str) -> str:
  """Of a model: its folder's, without the `bundle` that trainers write."""
  path = pathlib.Path(folder).resolve()
  return path.parent.name if path.name == "bundle" else path.name


def _complete(args: ServeOptions) -> ServeOptions:
  """Returns the options with what follows from others and from what is installed."""
  found: dict[str, Any] = {}
  if args.workdir:
    if args.gpt or args.tokenizer or args.t5:
      raise UserError("--workdir stands for --gpt, --tokenizer and --t5: give one kind")
    workdir = pathlib.Path(args.workdir).expanduser()
    encoder = workdir / "t5"
    found = {part: str(workdir / part / "bundle") for part in ("gpt", "tokenizer")}
    found |= {
      "t5": str(encoder) if encoder.exists() else "",
      "name": args.name or workdir.resolve().name,
    }
  elif not args.gpt or not args.tokenizer:
    raise UserError("expected --gpt and --tokenizer, or --workdir of a quickstart")
  installed = importlib.util.find_spec("gradio") is not None
  if args.demo and not installed:
    raise UserError("--demo needs gradio: pip install 'llamagen_jax[demo]'")
  demo = installed if args.demo is None else args.demo
  return dataclasses.replace(args, demo=demo, **found)


def _listen(host: str, port: int) -> socket.socket:
  """Takes the address before any model is loaded."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise UserError(f"--address={host} --port={port}: {error}") from error


def _run(app, service: Service, listening: socket.socket) -> None:
  """Serves until SIGTERM or SIGINT, and then finishes what was accepted."""
  config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30)
  server = _Server(config)

  def stop(number, frame) -> None:
    service.draining = True
    server.force_exit = server.should_exit and number == signal.SIGINT
    server.should_exit = True

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  asyncio.run(server.serve(sockets=[listening]))


class _Server(uvicorn.Server):
  """A server that leaves signals alone; uvicorn's own dies of them in the end."""

  @contextlib.contextmanager
  def capture_signals(self):
    yield
