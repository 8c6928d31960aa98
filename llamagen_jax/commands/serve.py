"""Serves images over HTTP, by the API of OpenAI, with a web demo.

With LLAMAGEN_API_KEY in the environment, requests need that key.

llamagen serve --workdir=quickstart
llamagen serve --gpt=c2i_L_384 --tokenizer=vq16 --address=0.0.0.0
llamagen serve --gpt c2i_L c2i_XL --tokenizer=vq16 --size-policy=resize
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import logging as python_logging
import os
import pathlib
import socket
import sys
from typing import Any

from absl import logging
import jax

from llamagen_jax.commands import arguments
from llamagen_jax.commands.generation import EXAMPLES, for_decoding
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import KV_CACHES
from llamagen_jax.options import option
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sampling.sample import restrict_to_codebook
from llamagen_jax.storage import local_path, read_text
from llamagen_jax.weights import bundle, hub
from llamagen_jax.weights.adapter import apply_adapter
from llamagen_jax.weights.t5 import load_t5

# Of the extra `serve`.
SERVER = (
  "fastapi", "fastapi_offline", "prometheus_client", "sse_starlette", "uvicorn",
)  # fmt: skip
missing = [name for name in SERVER if importlib.util.find_spec(name) is None]
if missing:
  raise UserError(f"{missing[0]} is missing: pip install 'llamagen_jax[serve]'")

from llamagen_jax.serving import http_server  # noqa: E402
from llamagen_jax.serving.api import BODY_SECONDS, make_app  # noqa: E402
from llamagen_jax.serving.auth import KEY  # noqa: E402
from llamagen_jax.serving.engine import CHUNK, Engine  # noqa: E402
from llamagen_jax.serving.http_server import Timeouts  # noqa: E402
from llamagen_jax.serving.image_model import ImageModel  # noqa: E402
from llamagen_jax.serving.middleware import access_log  # noqa: E402
from llamagen_jax.serving.service import Limits, Service  # noqa: E402
from llamagen_jax.serving.sizes import POLICIES  # noqa: E402
from llamagen_jax.serving.store import FolderStore  # noqa: E402
from llamagen_jax.serving.worker import Worker  # noqa: E402

LOOPBACK = ("127.0.0.1", "::1", "localhost")
CLIENTS, HTTP = "What clients may ask", "HTTP"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Models."""

  gpt: tuple[str, ...] = option(
    "bundles of transformers; the first is the default model", (), unit="FOLDER"
  )
  tokenizer: tuple[str, ...] = option(
    "bundle of their tokenizer, or one for each", (), unit="FOLDER"
  )
  adapter: tuple[str, ...] = option(
    "what finetuned models add to the transformers, one for each", (), unit="FOLDER"
  )
  t5: str = option("the T5 that the transformers were trained with", "", unit="FOLDER")
  name: tuple[str, ...] = option("of the models; default: their folders'", ())
  slots: int = option(
    "images generated at once with guidance, twice as many without", 16,
    unit="IMAGES", at_least=1,
  )  # fmt: skip
  chunk: int = option(
    "forwards between two moments at which requests join and leave", CHUNK,
    unit="FORWARDS", at_least=1,
  )  # fmt: skip
  window: int = option(
    "codes that a forward reads; more need fewer forwards for the same codes, up to"
    " rounding", 1, unit="CODES", at_least=1,
  )  # fmt: skip
  candidates: int = option(
    "drawn at once for an edit, one edit at a time; 0 = no edits", 8, unit="IMAGES",
    at_least=0,
  )  # fmt: skip
  tensor: int = option("devices that share one model", 1, unit="DEVICES", at_least=1)
  dtype: str = option(
    "of the transformers' activations; default: float32 on CPU, else bfloat16", "",
    choices=("float32", "bfloat16"),
  )  # fmt: skip
  weights: str = option(
    "of the transformers' matrices; int8 halves the bytes that a step in bfloat16"
    " reads, and changes the codes a little", "float", choices=("float", "int8"),
  )  # fmt: skip
  kv_cache: str | None = option(
    "of the codes' keys and values; int8 nearly halves their bytes in bfloat16, and"
    " changes the codes a little; default: the bundles', float", None,
    choices=KV_CACHES,
  )  # fmt: skip
  queue: int = option(
    "images that may wait while all slots are busy, more are answered with 429;"
    " default: as many as slots, so that nobody waits for long", 0,
    unit="IMAGES", at_least=0, group=CLIENTS,
  )  # fmt: skip
  max_images: int = option(
    "images of one request, at most", Limits.images, at_least=1, group=CLIENTS
  )
  seconds: float = option(
    "after which a request is given up", Limits.seconds, unit="SECONDS", group=CLIENTS
  )
  body_bytes: int = option(
    "of a request, at most", Limits.body_bytes, unit="BYTES", at_least=1, group=CLIENTS
  )
  upload_bytes: int = option(
    "of a request with an image, at most", Limits.upload_bytes, unit="BYTES",
    at_least=1, group=CLIENTS,
  )  # fmt: skip
  alias: tuple[str, ...] = option(
    "other names of the first model, such as those that OpenAI's clients send",
    Limits.aliases, unit="NAME", group=CLIENTS,
  )  # fmt: skip
  any_model: bool = option(
    "let every unknown name mean the first model", False, group=CLIENTS
  )
  size_policy: str = option(
    "for a size that a model does not generate: refuse it, use the model's own and say"
    " so, or resize", Limits.size_policy, choices=POLICIES, group=CLIENTS,
  )  # fmt: skip
  strict: bool = option(
    "refuse unknown fields of a request instead of ignoring them with a warning", False,
    group=CLIENTS,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
  """Options of serve."""

  workdir: str = option(
    "of a quickstart, in place of --gpt, --tokenizer and --t5", "", unit="FOLDER"
  )
  demo: bool | None = option(
    "serve the web page at /demo; default: if gradio is installed", None
  )
  example: tuple[str, ...] = option(
    "prompts that the web page offers; default: those of --workdir, or of landscapes",
    (), unit="PROMPT",
  )  # fmt: skip
  store: str | None = option(
    "keeps images that have a URL; default: memory, for an hour", None, unit="FOLDER"
  )
  store_days: float = option(
    "after which images in --store are deleted; 0 = never", 30.0,
    unit="DAYS", at_least=0,
  )  # fmt: skip
  address: str = option("address to listen at", LOOPBACK[0], group=HTTP)
  port: int = option("0 = any that is free", 8000, at_least=0, group=HTTP)
  public_url: str = option(
    "where clients reach the server; default: as their proxy's headers say", "",
    unit="URL", group=HTTP,
  )  # fmt: skip
  cors_origin: tuple[str, ...] = option(
    "web pages that may ask from a browser, such as https://app.example; * = all", (),
    unit="ORIGIN", group=HTTP,
  )  # fmt: skip
  access_log: bool = option(
    "write a line of JSON for each request to stderr", True, group=HTTP
  )
  connections: int = option(
    "at a time, at most", Timeouts.connections, at_least=1, group=HTTP
  )
  head_seconds: float = option(
    "until the head of a request must be there", Timeouts.head,
    unit="SECONDS", group=HTTP,
  )  # fmt: skip
  body_seconds: float = option(
    "until the body of a request must be there", BODY_SECONDS,
    unit="SECONDS", group=HTTP,
  )  # fmt: skip
  idle_seconds: float = option(
    "after which an unused connection is closed", Timeouts.idle,
    unit="SECONDS", group=HTTP,
  )  # fmt: skip
  drain_seconds: float = option(
    "to finish accepted requests after SIGTERM, at most", Timeouts.drain,
    unit="SECONDS", group=HTTP,
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  args = _complete(arguments.parse(ServeOptions, "serve", argv, __doc__))
  with _listen(args.address, args.port) as listening:
    key = os.environ.get(KEY, "")
    if args.address not in LOOPBACK and not key:
      logging.warning(
        "--address=%s without %s: anybody may use the server", args.address, KEY
      )
    store = None
    if args.store:
      store = FolderStore(local_path(args.store, "--store"), args.store_days)
    if args.access_log:
      _log_access()
    service = make_service(args)
    app = make_app(
      service, store, api_key=key, public_url=args.public_url,
      cors_origins=args.cors_origin, body_seconds=args.body_seconds,
    )  # fmt: skip
    host = f"[{args.address}]" if ":" in args.address else args.address
    where = f"http://{host}:{listening.getsockname()[1]}"
    print(f"{', '.join(service.models)} at {where}/v1/images/generations", flush=True)
    if args.demo:
      from llamagen_jax.serving.demo import PATH, PROMPTS, mount_demo

      mount_demo(app, service, key, args.example or PROMPTS)
      print(f"demo at {where}{PATH}", flush=True)
    elif args.demo is None:
      print("no demo: it needs pip install 'llamagen_jax[demo]'", flush=True)
    timeouts = Timeouts(
      head=args.head_seconds, idle=args.idle_seconds, drain=args.drain_seconds,
      connections=args.connections,
    )  # fmt: skip
    http_server.run(app, service, listening, timeouts)


def make_service(options: Options) -> Service:
  """Loads the models of a server. They compile when its app starts."""
  o = options
  tokenizers = o.tokenizer * len(o.gpt) if len(o.tokenizer) == 1 else o.tokenizer
  names = o.name or tuple(map(_name, o.gpt))
  adapters = o.adapter or ("",) * len(o.gpt)
  for flag, values in (
    ("tokenizer", tokenizers), ("name", names), ("adapter", adapters),
  ):  # fmt: skip
    if len(values) != len(o.gpt):
      raise UserError(
        f"--{flag}: {len(values)} for {len(o.gpt)} transformers (--gpt); expected one"
        " for each"
      )
  if len(set(names)) < len(names):
    raise UserError(f"models {', '.join(names)}: expected names that differ (--name)")
  mesh = make_mesh(tensor=o.tensor)
  dtype = o.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  encoder = load_t5(o.t5, dtype=dtype) if o.t5 else None
  load_tokenizer = functools.cache(bundle.load_tokenizer)
  workers = {}
  models = zip(o.gpt, adapters, tokenizers, names, strict=True)
  for folder, adapter, tokenizer, name in models:
    gpt = bundle.load_gpt(folder, mesh, dtype, o.kv_cache)
    gpt = apply_adapter(adapter, gpt) if adapter else gpt
    codebook = load_tokenizer(tokenizer)
    gpt = restrict_to_codebook(gpt, codebook)
    gpt = for_decoding(gpt, o.weights)
    for grid in gpt.config.grids:  # a size each, with slots of its own
      sized = dataclasses.replace(gpt, config=gpt.config.at(grid))
      model = ImageModel(name, sized, codebook, encoder)
      engine = Engine(sized, o.slots, o.chunk, o.window, o.candidates)
      workers[model] = Worker(engine, model.render, o.queue or o.slots)
  limits = Limits(
    images=o.max_images, seconds=o.seconds, body_bytes=o.body_bytes, aliases=o.alias,
    any_model=o.any_model, strict=o.strict, size_policy=o.size_policy,
    upload_bytes=o.upload_bytes if o.candidates else 0,
  )  # fmt: skip
  return Service(workers, limits)


def _name(folder: str) -> str:
  """Of a model: its folder's, without the `bundle` that trainers write."""
  if hub.is_spec(folder):
    return hub.parse(folder)[0].partition("/")[2]
  path = pathlib.Path(folder).resolve()
  return path.parent.name if path.name == "bundle" else path.name


def _complete(args: ServeOptions) -> ServeOptions:
  """Returns the options with what follows from others and from what is installed."""
  found: dict[str, Any] = {}
  if args.workdir:
    if args.gpt or args.tokenizer or args.t5:
      raise UserError("--workdir stands for --gpt, --tokenizer and --t5: give one kind")
    workdir = local_path(args.workdir, "--workdir")
    encoder, examples = workdir / "t5", workdir / EXAMPLES
    found = {part: (str(workdir / part / "bundle"),) for part in ("gpt", "tokenizer")}
    found |= {
      "t5": str(encoder) if encoder.exists() else "",
      "name": args.name or (workdir.resolve().name,),
    }
    if examples.exists() and not args.example:
      found["example"] = tuple(read_text(examples).splitlines())
  elif not args.gpt or not args.tokenizer:
    raise UserError("expected --gpt and --tokenizer, or --workdir of a quickstart")
  installed = importlib.util.find_spec("gradio") is not None
  if args.demo and not installed:
    raise UserError("--demo needs gradio: pip install 'llamagen_jax[demo]'")
  if args.demo is None and installed:
    found["demo"] = True
  if args.public_url and not args.public_url.startswith(("http://", "https://")):
    raise UserError(
      f"--public-url={args.public_url}: expected http://... or https://..."
    )
  return dataclasses.replace(args, **found)


def _log_access() -> None:
  handler = python_logging.StreamHandler(sys.stderr)
  handler.setFormatter(python_logging.Formatter("%(message)s"))
  access_log.addHandler(handler)
  access_log.setLevel(python_logging.INFO)
  access_log.propagate = False


def _listen(host: str, port: int) -> socket.socket:
  """Takes the address before any model is loaded."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise UserError(f"--address={host} --port={port}: {error}") from error
