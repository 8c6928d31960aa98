"""Load test of the slot engine, against one request at a time and static batches.

python -m benchmarks.serving                  # GPT-B, 256 codes, guidance, float32
python -m benchmarks.serving --slots=64 --loads=saturated
python -m benchmarks.serving --workdir=quickstart --settings=mixed

saturated: a closed loop of twice as many clients as there are slots. poisson: requests
that arrive at random, at 80 % of what the engine did saturated. In time is who waits
no longer than static batches make one wait at worst while they keep up: for a batch
that has just begun, and for his own. first_partial: the median time to a quarter of the
codes.

A static batch takes what waits and has the same sampling settings as the first of it,
generates it by the loop of `sample`, and only then looks at the queue again; its size
is that of the slots. Without --workdir weights are random and images are not rendered:
on a CPU the tokenizer would take longer than the codes.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import threading
import time

import jax
import numpy as np

from benchmarks.decode import random_params
from llamagen_jax import generate
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import PRESETS, GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.runtime import prepare
from llamagen_jax.sampling.keys import image_keys
from llamagen_jax.serving.engine import CHUNK, Engine
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.request import Request
from llamagen_jax.serving.worker import Finished, RequestHandle, Worker
from llamagen_jax.weights import bundle

LOAD = 0.8
PARTIAL = 0.25  # of the codes: when a first partial image is worth showing
KEY = np.zeros(2, np.uint32)
GUIDED = SamplingConfig(guidance_scale=4.0, top_k=2000)
MIXED = (
  GUIDED,
  SamplingConfig(guidance_scale=2.0),
  SamplingConfig(guidance_scale=7.5, guidance_schedule="power-cosine", top_p=0.9),
  SamplingConfig(temperature=0.9, top_k=500),
)


def main() -> None:
  prepare(steady=True)
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--preset", default="B", choices=PRESETS)
  add("--image-size", type=int, default=256)
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--workdir", help="of a quickstart: its models, with rendering")
  add("--slots", type=int, default=16)
  add("--chunk", type=int, default=CHUNK)
  add("--requests", type=int, default=64)
  add("--settings", default="same", choices=("same", "mixed"))
  add("--loads", nargs="+", default=["saturated", "poisson"])
  args = parser.parse_args()

  gpt, render = _models(args)
  requests = _requests(gpt, args.requests, MIXED if args.settings == "mixed" else ())
  kinds = {
    "one at a time": lambda: StaticBatches(gpt, 1, render, requests),
    f"static batches of {args.slots}": lambda: StaticBatches(
      gpt, args.slots, render, requests
    ),
    f"engine, {args.slots} slots": lambda: Worker(
      Engine(gpt, args.slots, args.chunk), render, args.requests
    ),
  }
  print(
    f"{gpt.config.image_tokens} codes, {args.settings} settings, chunks of"
    f" {args.chunk}, {jax.devices()[0]}\n"
  )
  found, codes = {"saturated": {}, "poisson": {}}, gpt.config.image_tokens
  for name, make in kinds.items():
    few = (
      requests[: max(3, len(requests) // 16)] if name == "one at a time" else requests
    )
    load = closed_loop(2 * args.slots)
    found["saturated"][name] = run(make(), few, codes, load)
    _print("saturated", name, found)
  if "poisson" in args.loads:
    deadline = 2 * seconds_of_a_batch(gpt, args.slots)
    print(f"\nin time: within {deadline:.1f} s")
    rate = LOAD * found["saturated"][f"engine, {args.slots} slots"]["images_per_second"]
    for name, make in list(kinds.items())[1:]:
      found["poisson"][name] = run(make(), requests, codes, poisson(rate), deadline)
      _print("poisson", name, found)
  print(json.dumps(vars(args) | found))


def _models(args):
  if args.workdir:
    gpt = bundle.load_gpt(f"{args.workdir}/gpt/bundle")
    tokenizer = bundle.load_tokenizer(f"{args.workdir}/tokenizer/bundle")
    image_model = ImageModel("quickstart", gpt, tokenizer)
    image_model.warm_up()
    return gpt, image_model.render
  config = GPTConfig.preset(args.preset, image_size=args.image_size, dtype=args.dtype)
  params = decoding_params(config, random_params(config))
  gpt = bundle.Transformer(config, params, GUIDED, "random")
  return gpt, lambda codes: np.zeros((1, 1, 1, 3), np.uint8)


def _requests(gpt, count: int, mixed: tuple[SamplingConfig, ...]) -> list[Request]:
  rng = np.random.default_rng(0)
  return [
    Request(
      int(rng.integers(gpt.config.num_classes)),
      key,
      mixed[rng.integers(len(mixed))] if mixed else GUIDED,
    )
    for key in image_keys(0, range(count))
  ]


class StaticBatches:
  """Batches of one size, one after the other; as much of a `Worker` as is needed."""

  def __init__(self, gpt, size: int, render, requests: list[Request]):
    """Compiles for the settings of the requests to come, before the clock starts."""
    self._gpt, self._size, self._render = gpt, size, render
    self._waiting: collections.deque[RequestHandle] = collections.deque()
    self._state, self._stopping = threading.Condition(), False
    self._thread = threading.Thread(target=self._main)
    for sampling in {request.sampling for request in requests}:
      generate_batch(gpt, size, [Request(0, KEY, sampling)])

  ready = True

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    with self._state:
      self._stopping = True
      self._state.notify()
    self._thread.join()

  def submit(self, requests: list[Request]) -> list[RequestHandle]:
    handles = [RequestHandle(self, request) for request in requests]
    with self._state:
      self._waiting += handles
      self._state.notify()
    return handles

  def _main(self) -> None:
    while handles := self._next():
      requests = [handle.request for handle in handles]
      codes_BT = generate_batch(self._gpt, self._size, requests)
      for handle, codes in zip(handles, codes_BT, strict=False):
        handle.post(Finished(self._render(codes[None])[0], codes))

  def _next(self) -> list[RequestHandle]:
    with self._state:
      while not self._waiting and not self._stopping:
        self._state.wait()
      if self._stopping:
        return []
      sampling = self._waiting[0].request.sampling
      alike = [t for t in self._waiting if t.request.sampling == sampling]
      taken = alike[: self._size]
      self._waiting = collections.deque(t for t in self._waiting if t not in taken)
      return taken


def generate_batch(gpt, size: int, requests: list[Request]) -> np.ndarray:
  """Codes [size, T]; a batch that is not full repeats its last request."""
  padded = [*requests, *[requests[-1]] * (size - len(requests))]
  labels = np.array([request.condition for request in padded], np.int32)
  keys = jax.random.wrap_key_data(np.stack([r.key for r in padded]))
  sampling = requests[0].sampling
  return np.asarray(generate(gpt.config, gpt.params, labels, keys, None, sampling))


def seconds_of_a_batch(gpt, size: int) -> float:
  """What a static batch takes, when static batches have run before."""
  started = time.perf_counter()
  generate_batch(gpt, size, [Request(0, KEY, GUIDED)])
  return time.perf_counter() - started


@dataclasses.dataclass
class Record:
  """When things happened to a request, in seconds."""

  sent: float
  first: float = np.nan  # partial image
  done: float = np.nan


async def follow(worker, request: Request, record: Record, enough: int) -> None:
  """Waits for an image; `enough` codes make a partial one."""
  [handle] = worker.submit([dataclasses.replace(request, codes=[])])
  async for event in handle:
    if np.isnan(record.first) and len(event.codes) >= enough:
      record.first = time.perf_counter()
  record.done = time.perf_counter()


def closed_loop(clients: int):
  """Clients that ask again as soon as they are answered."""

  async def load(ask, requests) -> None:
    left = iter(requests)

    async def client() -> None:
      for request in left:
        await ask(request)

    await asyncio.gather(*(client() for _ in range(clients)))

  return load


def poisson(rate: float):
  """Requests that arrive independently, `rate` a second."""

  async def load(ask, requests) -> None:
    gaps = np.random.default_rng(1).exponential(1 / rate, len(requests))
    coming, start = [], time.perf_counter()
    for request, due in zip(requests, np.cumsum(gaps), strict=True):
      await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
      coming.append(asyncio.create_task(ask(request)))
    await asyncio.gather(*coming)

  return load


def run(
  worker, requests: list[Request], codes: int, load, deadline: float | None = None
) -> dict[str, float]:
  """Puts a load on a worker, compiled first, and says what became of it.

  Images a second count to the moment of the last request: what is late is missing.
  In a closed loop that moment is the last answer's.
  """
  records: list[Record] = []
  enough = int(PARTIAL * codes)

  async def ask(request: Request) -> None:
    records.append(record := Record(time.perf_counter()))
    await follow(worker, request, record, enough)

  async def main() -> None:
    worker.start()
    while not worker.ready:
      await asyncio.sleep(0.05)
    await load(ask, requests)

  asyncio.run(main())
  worker.stop()
  sent, first, done = np.array([(r.sent, r.first, r.done) for r in records]).T
  end = done.max() if load.__qualname__.startswith("closed") else sent.max()
  latency, seconds = done - sent, end - sent.min()
  found = {"images_per_second": float((done <= end).sum() / seconds)}
  if deadline is not None:
    found["in_time_per_second"] = float((latency <= deadline).sum() / seconds)
  percentiles = {f"p{q}": float(np.percentile(latency, q)) for q in (50, 95, 99)}
  return found | percentiles | {"first_partial": float(np.median(first - sent))}


def _print(load: str, name: str, found) -> None:
  row = found[load][name]
  if len(found[load]) == 1:
    titles = [key.replace("_per_second", "/s") for key in row]
    print(f"{load:22}" + "".join(f"{title:>15}" for title in titles))
  print(f"  {name:20}" + "".join(f"{x:15.2f}" for x in row.values()), flush=True)


if __name__ == "__main__":
  main()
