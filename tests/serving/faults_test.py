"""Overload, hang-ups, deadlines and a dead engine, seen by clients."""

import asyncio
import re

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from tests.serving import live  # noqa: E402

PATH = "/v1/images/generations"
IDLE = {"queue_length": 0, "slots_busy": 0}


@pytest.fixture(scope="module")
def image_model():
  image_model = live.tiny_studio()
  image_model.warm_up()
  return image_model


def metrics(server) -> dict[str, float]:
  """Name with labels -> value, without the prefix."""
  lines = httpx.get(server.url + "/metrics").text.splitlines()
  found = [re.fullmatch(r"llamagen_(\S+) (\S+)", line) for line in lines]
  return {match[1]: float(match[2]) for match in found if match}


def is_idle(server) -> bool:
  return not server.backend.queued and not server.backend.busy_slots


def test_a_full_queue_sheds_with_429(image_model):
  with live.serve(image_model, places=4) as server:
    server.backend.last = 3

    async def burst():
      async with httpx.AsyncClient(timeout=30) as client:
        body = {"prompt": "1"}
        posts = [
          asyncio.create_task(client.post(server.url + PATH, json=body))
          for _ in range(40)
        ]
        while len(server.backend.requests) + sum(p.done() for p in posts) < 40:
          await asyncio.sleep(0.01)
        server.backend.last = 16
        return await asyncio.gather(*posts)

    responses = asyncio.run(burst())
    shed = [r for r in responses if r.status_code == 429]
    assert len(shed) + sum(r.status_code == 200 for r in responses) == 40
    assert 4 <= 40 - len(shed) <= 4 + 2  # places and slots
    for response in shed:
      assert response.json()["error"]["code"] == "rate_limit_exceeded"
      assert int(response.headers["retry-after"]) >= 1
    seen = metrics(server)
    assert seen['rejected_total{reason="queue_full"}'] == len(shed)
    assert seen["images_total"] == 40 - len(shed)
    assert seen["codes_total"] == 16 * (40 - len(shed))
    assert seen["request_seconds_count"] == 40 - len(shed)
    assert seen.items() >= IDLE.items() and seen["slots"] == 2
    assert seen[f'responses_total{{path="{PATH}",status="429"}}'] == len(shed)


def test_a_request_gets_all_its_places_or_none(image_model):
  with live.serve(image_model, tick=0.05, places=3, slots=1) as server:
    response = httpx.post(server.url + PATH, json={"prompt": "1", "n": 4})
    assert response.status_code == 429 and not server.backend.requests


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_free_their_places(image_model, stream):
  with live.serve(image_model, tick=0.05, places=100, slots=8) as server:
    server.backend.last = 12
    body = {"prompt": "1", "stream": stream}
    if stream:
      body["partial_images"] = 3

    async def hang_up_midway(client):
      async with client.stream("POST", server.url + PATH, json=body) as response:
        async for _ in response.aiter_bytes():
          return

    async def crowd():
      async with httpx.AsyncClient(timeout=30, limits=httpx.Limits()) as client:
        tasks = [asyncio.create_task(hang_up_midway(client)) for _ in range(60)]
        while len(server.backend.requests) < 60:
          await asyncio.sleep(0.01)
        while not (
          any(t.done() for t in tasks) if stream else server.backend.busy_slots
        ):
          await asyncio.sleep(0.01)
        for task in tasks:
          task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    live.wait_until(lambda: is_idle(server), seconds=2)
    assert metrics(server)['cancelled_total{reason="disconnect"}'] == 60
    server.backend.last = 16
    assert httpx.post(server.url + PATH, json={"prompt": "1"}).status_code == 200


def test_a_deadline_ends_a_request(image_model):
  limits = live.Limits(images=4, seconds=0.2, body_bytes=10_000)
  with live.serve(image_model, limits=limits) as server:
    server.backend.last = 15  # they would never end
    response = httpx.post(server.url + PATH, json={"prompt": "1", "n": 2})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert is_idle(server)
    body = {"prompt": "1", "stream": True}
    text = httpx.post(server.url + PATH, json=body).text
    assert text.startswith("event: error\n") and "deadline_exceeded" in text
    assert is_idle(server)
    assert metrics(server)['cancelled_total{reason="deadline"}'] == 2


def test_before_the_start_and_after_the_death_of_the_engine(image_model):
  with live.serve(image_model) as server:
    server.backend.last = 15

    def states():
      return [httpx.get(server.url + p).status_code for p in ("/health", "/ready")]

    server.backend.ready = False
    assert states() == [200, 503]
    response = httpx.post(server.url + PATH, json={"prompt": "1"})
    assert response.status_code == 503 and response.headers["retry-after"]
    server.backend.ready = True
    assert states() == [200, 200]

    async def die_midway():
      async with httpx.AsyncClient() as client:
        post = asyncio.create_task(client.post(server.url + PATH, json={"prompt": "1"}))
        while not server.backend.busy_slots:
          await asyncio.sleep(0.01)
        server.backend.die()
        return await post

    response = asyncio.run(die_midway())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"
    assert states() == [503, 503]
