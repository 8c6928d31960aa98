"""Ten times more requests than a server can answer, and clients that walk away."""

import asyncio
import dataclasses
import time

import jax
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llamagen_jax import GPTConfig, SamplingConfig  # noqa: E402
from llamagen_jax.gpt.model import init_gpt  # noqa: E402
from llamagen_jax.parallel.mesh import unbox  # noqa: E402
from llamagen_jax.tokenizer.model import init_tokenizer  # noqa: E402
from llamagen_jax.weights import bundle  # noqa: E402
from tests import tiny  # noqa: E402
from tests.commands.serve_test import running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SLOTS = QUEUE = 4
BUSY, WAITING = 'llamagen_slots_busy{model="gpt"}', 'llamagen_queue_length{model="gpt"}'
OVERLOAD_SECONDS = 30
# Slow enough that a client in Python can ask for ten times as much.
CONFIG = GPTConfig(
  12, 6, 384, grid=8, vocab_size=tiny.TOKENIZER.codebook_size, num_classes=4
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "vq", tiny.TOKENIZER, params)
  params = unbox(init_gpt(CONFIG, jax.random.key(1)))
  sampling = SamplingConfig(guidance_scale=2.0)
  bundle.save_gpt(
    folder / "gpt", bundle.Transformer(CONFIG, params, sampling, identity)
  )
  with running(folder, f"--slots={SLOTS}", f"--queue={QUEUE}") as server:
    yield server


@dataclasses.dataclass
class Answers:
  status: list[int] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)

  # From the first request to the last answer: the images of clients that asked just
  # before the end are counted, so their seconds are, too.
  wall: float = 0.0

  def p95(self) -> float:
    good = [s for s, code in zip(self.seconds, self.status, strict=True) if code == 200]
    return float(np.percentile(good, 95))

  def images_per_second(self) -> float:
    return self.status.count(200) / self.wall


async def ask(client, answers: Answers) -> int:
  started = time.perf_counter()
  response = await client.post("/v1/images/generations", json={"prompt": "1"})
  answers.seconds.append(time.perf_counter() - started)
  answers.status.append(response.status_code)
  if response.status_code == 429:
    assert int(response.headers["retry-after"]) >= 1
  return response.status_code


def client_of(server):
  limits = httpx.Limits(max_connections=None)
  return httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits)


async def full_load(server, seconds: float) -> Answers:
  """As many clients as there are slots and places; who is turned away comes again."""
  answers, start = Answers(), time.perf_counter()

  async def one(client) -> None:
    while time.perf_counter() < start + seconds:
      if await ask(client, answers) != 200:
        await asyncio.sleep(0.02)

  async with client_of(server) as client:
    await asyncio.gather(*(one(client) for _ in range(SLOTS + QUEUE)))
  answers.wall = time.perf_counter() - start
  return answers


async def overload(server, rate: float, seconds: float) -> Answers:
  """Requests at `rate` a second, whatever the answers."""
  answers, asked, start = Answers(), [], time.perf_counter()
  async with client_of(server) as client:
    for number in range(int(rate * seconds)):
      await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
      asked.append(asyncio.create_task(ask(client, answers)))
    await asyncio.gather(*asked)
  answers.wall = time.perf_counter() - start
  return answers


def test_overload_is_shed_and_does_not_slow_down_who_is_let_in(server, capsys):
  full = asyncio.run(full_load(server, 10))
  rate = full.images_per_second()
  flood = asyncio.run(overload(server, 10 * rate, OVERLOAD_SECONDS))
  with capsys.disabled():
    print(
      f"\nfull load {rate:.1f} images/s, p95 {full.p95():.2f} s; 10 times as much for"
      f" {OVERLOAD_SECONDS} s: {flood.images_per_second():.1f} images/s, p95"
      f" {flood.p95():.2f} s, {flood.status.count(429)} shed"
    )
  assert set(flood.status) == {200, 429}
  assert flood.images_per_second() > 0.7 * rate  # it goes on
  assert flood.p95() < 2 * full.p95()


def metrics(server) -> dict[str, float]:
  lines = httpx.get(f"{server.url}/metrics").text.splitlines()
  pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("llamagen_")]
  return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("stream", [False, True])
def test_100_clients_that_hang_up_leak_nothing(server, stream):
  body = {"prompt": "1", "stream": stream}

  async def hang_up(client, after: float) -> bool:
    """Whether it was let in."""
    try:
      async with asyncio.timeout(after):
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
          if answer.status_code == 429:
            return False
          await answer.aread()
    except TimeoutError:
      return True
    return False

  async def crowd() -> int:
    rng, gone = np.random.default_rng(0), 0
    async with client_of(server) as client:
      while gone < 100:
        waits = rng.uniform(0.05, 0.4, 2 * SLOTS)
        gone += sum(await asyncio.gather(*(hang_up(client, w) for w in waits)))
    return gone

  asyncio.run(crowd())
  end = time.monotonic() + 5
  while (seen := metrics(server))[BUSY] or seen[WAITING]:
    assert time.monotonic() < end, seen
    time.sleep(0.05)
  assert server.generate(prompt="1").status_code == 200
  assert metrics(server)[BUSY] == 0
