"""Two replicas behind Ray Serve on this machine, one of which dies at work."""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray.serve", reason="needs the extra `ray`")

from tests.processes import ROOT, free_port  # noqa: E402
from tests.sampling import fid_batch_test  # noqa: E402

saved = fid_batch_test.saved
pytestmark = [
  pytest.mark.extra,
  pytest.mark.slow,
  pytest.mark.alone,
  pytest.mark.nightly,
]

START_SECONDS = 180
CLIENTS = 6


@pytest.fixture(scope="module")
def url(saved, tmp_path_factory):
  port, log = free_port(), tmp_path_factory.mktemp("ray") / "log"
  command = (
    f"launch/serve_ray.py --gpt={saved}/gpt --tokenizer={saved}/vq --replicas=2"
    f" --slots=8 --cpus=0.5 --port={port}"
  )
  with log.open("w") as file:
    process = subprocess.Popen(
      [sys.executable, *command.split()], cwd=ROOT, stdout=file, stderr=file,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
  end = time.monotonic() + START_SECONDS
  while "serving at" not in log.read_text():
    assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
    time.sleep(0.5)
  yield f"http://127.0.0.1:{port}"
  process.send_signal(signal.SIGTERM)
  try:
    assert process.wait(60) == 0
  finally:
    process.kill()


def replicas() -> dict[int, int]:
  """Processes that serve, and the time on the CPU that they took so far, in ticks."""
  found = {}
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        found[int(folder.name)] = int(fields[11]) + int(fields[12])
    except OSError:  # it ended meanwhile
      continue
  return found


def test_two_replicas_share_the_load_and_survive_a_death(url):
  asks: list[tuple[float, int]] = []  # when it was sent, and the status

  async def client(http, end: float) -> None:
    while time.monotonic() < end:
      sent = time.monotonic()
      answer = await http.post(f"{url}/v1/images/generations", json={"prompt": "1"})
      asks.append((sent, answer.status_code))

  async def load(seconds: float, meanwhile=None) -> None:
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=60) as http:
      clients = [client(http, end) for _ in range(CLIENTS)]
      await asyncio.gather(*clients, *([meanwhile] if meanwhile else []))

  before = replicas()
  assert len(before) == 2
  asyncio.run(load(6))
  worked = {pid: ticks - before[pid] for pid, ticks in replicas().items()}
  assert min(worked.values()) > 0.25 * sum(worked.values()), worked
  assert {status for _, status in asks} == {200}

  victim, died = max(worked, key=worked.get), 0.0

  async def kill() -> None:
    nonlocal died
    await asyncio.sleep(2)
    os.kill(victim, signal.SIGKILL)
    died = time.monotonic()

  asks.clear()
  asyncio.run(load(10, kill()))
  failed = [sent for sent, status in asks if status != 200]
  assert all(sent < died for sent in failed)  # those were on their way
  assert len(failed) <= CLIENTS
  assert sum(sent > died for sent, _ in asks) > CLIENTS

  end = time.monotonic() + START_SECONDS
  while len(fresh := replicas().keys() - {victim}) < 2:
    assert time.monotonic() < end, "no other replica came"
    time.sleep(0.5)
  assert fresh - before.keys()
