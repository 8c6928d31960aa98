"""Overload, hang-ups, deadlines and a dead engine, seen by clients."""

import asyncio
import dataclasses
import re
import threading

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from tests.serving import live  # noqa: E402

PATH = "/v1/images/generations"
BODY = {"prompt": "1"}
IDLE = {'queue_length{model="tiny"}': 0, 'slots_busy{model="tiny"}': 0}


def metrics(server) -> dict[str, float]:
  """Name with labels -> value, without the prefix."""
  lines = live.HTTP.get(server.url + "/metrics").text.splitlines()
  found = [re.fullmatch(r"llamagen_(\S+) (\S+)", line) for line in lines]
  return {match[1]: float(match[2]) for match in found if match}


def test_a_full_queue_sheds_with_429(image_model):
  with live.serve(image_model, queue=4) as server:
    server.engine.last = 3

    async def burst():
      async with httpx.AsyncClient(timeout=120) as client:
        body = {"prompt": "1"}
        posts = [
          asyncio.create_task(client.post(server.url + PATH, json=body))
          for _ in range(40)
        ]
        while sum(p.done() for p in posts) < 40 - 4 - 2:  # queue and slots
          await asyncio.sleep(0.01)
        server.engine.last = 16
        return await asyncio.gather(*posts)

    responses = asyncio.run(burst())
    shed = [r for r in responses if r.status_code == 429]
    assert len(shed) + sum(r.status_code == 200 for r in responses) == 40
    assert len(shed) == 40 - 4 - 2
    for response in shed:
      assert response.json()["error"]["code"] == "rate_limit_exceeded"
    seen = metrics(server)
    assert seen['rejected_total{reason="queue_full"}'] == len(shed)
    assert seen['images_total{model="tiny"}'] == 40 - len(shed)
    assert seen['codes_total{model="tiny"}'] == 16 * (40 - len(shed))
    assert seen["request_seconds_count"] == 40 - len(shed)
    assert seen.items() >= IDLE.items() and seen['slots{model="tiny"}'] == 2
    assert seen[f'responses_total{{path="{PATH}",status="429"}}'] == len(shed)


def test_retry_after_tells_the_queue_and_is_spread(image_model):
  """40 images wait, 2 at a time, 30 s each: 10 minutes and up to as much again."""
  with live.serve(image_model, queue=38) as server:
    server.engine.last = 3
    server.worker.mean_seconds = 30.0

    async def burst():
      async with httpx.AsyncClient(timeout=120) as client:
        body = {"prompt": "1", "n": 4}
        posts = [
          asyncio.create_task(client.post(server.url + PATH, json=body))
          for _ in range(30)
        ]
        while sum(p.done() for p in posts) < 20:
          await asyncio.sleep(0.01)
        shed = [p.result() for p in posts if p.done()]
        server.engine.last = 16
        await asyncio.gather(*posts)
        return shed

    seconds = [int(r.headers["retry-after"]) for r in asyncio.run(burst())]
    assert all(570 <= s <= 2 * 660 for s in seconds) and len(set(seconds)) > 5


def test_an_idle_server_takes_queue_and_slots_at_once(image_model):
  limits = dataclasses.replace(live.LIMITS, images=100)
  with live.serve(image_model, queue=3, slots=2, limits=limits) as server:
    response = live.HTTP.post(server.url + PATH, json={"prompt": "1", "n": 5})
    assert len(response.json()["data"]) == 5
    # More can never be had: no reason to come again.
    response = live.HTTP.post(server.url + PATH, json={"prompt": "1", "n": 6})
    assert response.status_code == 400
    assert "6 images: expected 1 .. 5" in response.json()["error"]["message"]


def test_a_request_gets_all_its_places_or_none(image_model):
  with live.serve(image_model, queue=3, slots=1) as server:
    server.engine.last = 3

    async def two():
      async with httpx.AsyncClient(timeout=120) as client:
        first = asyncio.create_task(
          client.post(server.url + PATH, json=BODY | {"n": 2})
        )
        while not server.engine.requests:
          await asyncio.sleep(0.01)
        second = await client.post(server.url + PATH, json=BODY | {"n": 3})
        server.engine.last = 16
        return await first, second

    first, second = asyncio.run(two())
    assert (first.status_code, second.status_code) == (200, 429)
    assert len(server.engine.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_free_their_places(image_model, stream):
  with live.serve(image_model, tick=0.05, queue=100, slots=8) as server:
    server.engine.last = 12
    body = {"prompt": "1", "stream": stream}
    if stream:
      body["partial_images"] = 3

    async def hang_up_midway(client):
      async with client.stream("POST", server.url + PATH, json=body) as response:
        async for _ in response.aiter_bytes():
          return

    async def crowd():
      async with httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as client:
        tasks = [asyncio.create_task(hang_up_midway(client)) for _ in range(60)]
        while server.worker.queued + server.worker.busy_slots < 60:
          await asyncio.sleep(0.01)
        while not (
          any(t.done() for t in tasks) if stream else server.worker.busy_slots
        ):
          await asyncio.sleep(0.01)
        for task in tasks:
          task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    live.wait_until(server.is_idle)
    assert metrics(server)['cancelled_total{reason="disconnect"}'] == 60
    server.engine.last = 16
    assert live.HTTP.post(server.url + PATH, json={"prompt": "1"}).status_code == 200


def test_a_deadline_ends_a_request(image_model):
  limits = live.Limits(images=4, seconds=0.2, body_bytes=10_000)
  with live.serve(image_model, limits=limits) as server:
    server.engine.last = 15  # they would never end
    response = live.HTTP.post(server.url + PATH, json={"prompt": "1", "n": 2})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_exceeded"
    live.wait_until(server.is_idle)
    body = {"prompt": "1", "stream": True}
    text = live.HTTP.post(server.url + PATH, json=body).text
    assert text.startswith("event: error\n") and "deadline_exceeded" in text
    live.wait_until(server.is_idle)
    assert metrics(server)['cancelled_total{reason="deadline"}'] == 2


def test_before_the_start_and_after_the_death_of_the_engine(image_model):
  def states(server):
    return [live.HTTP.get(server.url + p).status_code for p in ("/health", "/ready")]

  async def die_midway(server):
    async with httpx.AsyncClient(timeout=120) as client:
      post = asyncio.create_task(client.post(server.url + PATH, json=BODY))
      while not server.worker.busy_slots:
        await asyncio.sleep(0.01)
      server.engine.error = RuntimeError("fake")
      return await post

  compiled = threading.Event()
  with live.serve(image_model, wait=False, compiled=compiled) as server:
    assert states(server) == [200, 503]
    response = live.HTTP.post(server.url + PATH, json=BODY)
    assert response.status_code == 503 and response.headers["retry-after"]
    compiled.set()
    live.wait_until(lambda: server.service.ready)
    assert states(server) == [200, 200]
    server.engine.last = 15
    response = asyncio.run(die_midway(server))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"
    assert states(server) == [503, 503]
    seen = metrics(server)
    assert seen['cancelled_total{reason="engine_died"}'] == 1
    assert seen['cancelled_total{reason="disconnect"}'] == 0


def test_a_start_that_fails_is_no_start_for_ever(image_model, monkeypatch):
  def no_memory(self, edits):
    raise MemoryError("no room for the decoder")

  monkeypatch.setattr(type(image_model), "warm_up", no_memory)
  with live.serve(image_model, wait=False) as server:
    live.wait_until(lambda: not server.service.alive)
    assert live.HTTP.get(server.url + "/health").status_code == 503
    response = live.HTTP.post(server.url + PATH, json=BODY)
    assert response.status_code == 503 and "died" in response.text
