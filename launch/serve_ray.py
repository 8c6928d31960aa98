"""`llamagen serve` on several machines: replicas of the engine behind Ray Serve.

  pip install -e '.[ray]'
  ray start --head                      # on one machine; elsewhere --address=HEAD:6379
  python launch/serve_ray.py --gpt=gs://bucket/L384 --tokenizer=gs://bucket/vq16 \\
      --replicas=2 --most-replicas=8 --resources='{"TPU": 4}'

A replica is a whole server: models, engine, queue and API. Ray's proxies send a request
to the replica that has fewer of them, start replicas while requests pile up, and
replace those whose engine has died. With LLAMAGEN_API_KEY in the environment of this
command, requests need that key.
"""

import argparse
import asyncio
import json
import os
import signal
import threading

import jax
from ray import serve

from llamagen_jax.commands.serve import Options, make_service
from llamagen_jax.errors import UserError
from llamagen_jax.serving.api import make_app
from llamagen_jax.serving.auth import KEY
from llamagen_jax.serving.store import DataURLs

ROUTE = "/"
HEALTH_SECONDS = 5  # between two looks at a replica
SPARE = 2  # requests over slots and queue that reach a replica, to be shed there


@serve.deployment
@serve.ingress()
class Replica:
  """One server, on chips of its own."""

  def __init__(self, options: Options, key: str):
    if jax.process_count() > 1:
      raise UserError(
        f"this TPU is a slice of {jax.process_count()} hosts; expected replicas on"
        " machines with chips of their own, such as v5litepod-4"
      )
    self._service, self._key = make_service(options), key

  def __serve_build_asgi_app__(self):
    # Memory would be that of one replica, and the next request may go to another.
    return make_app(self._service, DataURLs(), api_key=self._key)

  async def check_health(self) -> None:
    """Waits while the engine compiles, so that no request comes too early."""
    while self._service.alive and not self._service.ready:
      await asyncio.sleep(0.1)
    if not self._service.alive:
      raise RuntimeError("the engine has died")


def main() -> None:
  args = _parse()
  options = Options(
    gpt=(args.gpt,), tokenizer=(args.tokenizer,), t5=args.t5,
    name=(args.name,) if args.name else (), slots=args.slots, tensor=args.tensor,
    dtype=args.dtype,
  )  # fmt: skip
  resources = json.loads(args.resources)
  actor = {"num_cpus": args.cpus, "num_gpus": resources.pop("GPU", 0)}
  serve.start(http_options={"host": args.address, "port": args.port})
  held = options.slots + (options.queue or options.slots)
  deployment = Replica.options(
    autoscaling_config={
      "min_replicas": args.replicas,
      "max_replicas": max(args.replicas, args.most_replicas),
      "target_ongoing_requests": options.slots,
    },
    max_ongoing_requests=SPARE * held,
    health_check_period_s=HEALTH_SECONDS,
    graceful_shutdown_timeout_s=options.seconds,
    ray_actor_options=actor | {"resources": resources},
  )
  serve.run(deployment.bind(options, os.environ.get(KEY, "")), route_prefix=ROUTE)
  print(
    f"serving at http://{args.address}:{args.port}/v1/images/generations", flush=True
  )
  stopped = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.set())
  stopped.wait()
  serve.shutdown()


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add, default = parser.add_argument, Options()
  add("--gpt", required=True, type=_seen_by_all, help="bundle of the transformer")
  add("--tokenizer", required=True, type=_seen_by_all, help="bundle of the tokenizer")
  add("--t5", default="", type=_seen_by_all, help="folder of its T5, for captions")
  add("--name", default="", help="of the model")
  add("--slots", type=int, default=default.slots, help="of every replica")
  add("--tensor", type=int, default=1, help="chips of a replica that share one model")
  add("--dtype", default="", choices=("float32", "bfloat16"))
  add("--replicas", type=int, default=1, help="at least")
  add("--most-replicas", type=int, default=1, help="when requests pile up")
  add(
    "--resources", default="{}", help='of a replica, as JSON: {"TPU": 4} or {"GPU": 1}'
  )
  add("--cpus", type=float, default=1, help="of a replica")
  add("--address", default="127.0.0.1", help="address that Ray's proxies listen at")
  add("--port", type=int, default=8000)
  return parser.parse_args()


def _seen_by_all(folder: str) -> str:
  """A folder of a bucket, or one that is mounted at the same place everywhere."""
  elsewhere = "://" in folder or folder.startswith("hub:")
  return folder if not folder or elsewhere else os.path.abspath(folder)


if __name__ == "__main__":
  main()
