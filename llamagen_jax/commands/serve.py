"""`llamagen serve`: images over HTTP, by the API of OpenAI, and a web demo."""

import argparse
import asyncio
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket

from absl import logging
import jax

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5

try:
  import uvicorn

  from llamagen_jax.serving.api import make_app
  from llamagen_jax.serving.engine import CHUNK, Engine
  from llamagen_jax.serving.image_model import ImageModel
  from llamagen_jax.serving.service import Limits, Service
  from llamagen_jax.serving.store import Store
  from llamagen_jax.serving.worker import Worker
except ImportError as error:
  raise UserError(
    f"{error.name} is missing: pip install 'llamagen_jax[serve]'"
  ) from error

KEY = "LLAMAGEN_API_KEY"  # the variable; a flag would be seen in the list of processes
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Options:
  """What a server draws with."""

  gpt: str  # folder of the bundle
  tokenizer: str
  t5: str = ""  # folder of the text encoder, for a transformer of captions
  name: str = ""  # of the model; "" = that of the folder
  slots: int = 16  # images drawn at once with guidance, twice as many without
  chunk: int = CHUNK  # codes between two moments at which requests join and leave
  queue: int = 0  # images that may wait; 0 = as many as there are slots
  images: int = 10  # of one request
  seconds: float = 300.0  # until a request is given up
  body_bytes: int = 1_000_000
  tensor: int = 1  # devices that share one model
  dtype: str = ""  # of activations; "" = float32 on CPU, else bfloat16


def main(argv: Sequence[str]) -> None:
  args = _parse(argv)
  with _listen(args.host, args.port) as listening:
    key, store = os.environ.get(KEY, ""), Store(args.store)
    if args.host not in LOOPBACK and not key:
      logging.warning("--host=%s without %s: anybody may draw", args.host, KEY)
    service = make_service(_options(args))
    app = make_app(service, store, key)
    if args.demo:
      from llamagen_jax.serving.demo import PATH, mount_demo

      mount_demo(app, service, key)
    where = f"http://{args.host}:{listening.getsockname()[1]}"
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
  return Service(image_model, worker, Limits(o.images, o.seconds, o.body_bytes))


def _name(folder: str) -> str:
  """Of a model: its folder's, without the `bundle` that trainers write."""
  path = pathlib.Path(folder).resolve()
  return path.parent.name if path.name == "bundle" else path.name


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "llamagen serve", description=__doc__,
    epilog=f"With {KEY} in the environment, requests need that key.",
  )  # fmt: skip
  add, default = parser.add_argument, Options("", "")
  add("--gpt", help="bundle of the transformer")
  add("--tokenizer", help="bundle of the tokenizer")
  add("--t5", default="", help="folder of the T5 that the transformer was trained with")
  add("--workdir", type=pathlib.Path, help="of a quickstart, instead of these three")
  add("--name", default="", help="of the model; default: its folder's")
  add("--host", default=LOOPBACK[0], help="address to listen at (default %(default)s)")
  add("--port", type=int, default=8000, help="0 = any (default %(default)s)")
  add("--slots", type=int, default=default.slots, help="images drawn at once, with"
      " guidance; twice as many without (default %(default)s)")  # fmt: skip
  add("--chunk", type=int, default=default.chunk, help="codes between two moments at"
      " which requests join and leave (default %(default)s)")  # fmt: skip
  add("--queue", type=int, default=default.queue, help="images that may wait; more"
      " are answered with 429 (default: as many as there are slots, so that nobody"
      " waits for long)")  # fmt: skip
  add("--images", type=int, default=default.images, help="most of one request"
      " (default %(default)s)")  # fmt: skip
  add("--seconds", type=float, default=default.seconds, help="after which a request is"
      " given up (default %(default)s)")  # fmt: skip
  add("--body-bytes", type=int, default=default.body_bytes, help="of a request, at most"
      " (default %(default)s)")  # fmt: skip
  add("--tensor", type=int, default=1, help="devices that share one model")
  add("--dtype", default="", choices=("float32", "bfloat16"), help="of the"
      " transformer's activations; default: float32 on CPU, else bfloat16")  # fmt: skip
  add("--store", type=pathlib.Path, help="folder of images that get a URL")
  add("--demo", action=argparse.BooleanOptionalAction, help="serve the web page at"
      " /demo; default: if gradio is there")  # fmt: skip
  args = parser.parse_args(argv)
  _complete(args)
  for name in ("slots", "chunk", "images", "body_bytes", "tensor"):
    if getattr(args, name) < 1:
      flag = name.replace("_", "-")
      raise UserError(f"--{flag}={getattr(args, name)}: expected 1 or more")
  return args


def _complete(args: argparse.Namespace) -> None:
  """Fills in what follows from other flags and from what is installed."""
  if args.workdir:
    if args.gpt or args.tokenizer or args.t5:
      raise UserError("--workdir stands for --gpt, --tokenizer and --t5: give one kind")
    args.gpt, args.tokenizer = (
      str(args.workdir / part / "bundle") for part in ("gpt", "tokenizer")
    )
    encoder = args.workdir / "t5"
    args.t5 = str(encoder) if encoder.exists() else ""
    args.name = args.name or args.workdir.resolve().name
  if not args.gpt or not args.tokenizer:
    raise UserError("expected --gpt and --tokenizer, or --workdir of a quickstart")
  installed = importlib.util.find_spec("gradio") is not None
  if args.demo and not installed:
    raise UserError("--demo needs gradio: pip install 'llamagen_jax[demo]'")
  args.demo = installed if args.demo is None else args.demo


def _options(args: argparse.Namespace) -> Options:
  return Options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Options)})


def _listen(host: str, port: int) -> socket.socket:
  """Takes the address before any model is loaded."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise UserError(f"--host={host} --port={port}: {error}") from error


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
