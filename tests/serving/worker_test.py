"""The thread that draws: order, giving up, the end, and what happens when it dies."""

import asyncio
import threading

import numpy as np
import pytest

from llamagen_jax.serving.engine import Engine
from llamagen_jax.serving.protocol import Finished, Progress, QueueFull, WorkerDied
from llamagen_jax.serving.worker import Worker
from tests.serving.engine_test import CLASSES, drawn_alone, request, transformer

CHUNK = 4


@pytest.fixture(scope="module")
def gpt():
  return transformer(CLASSES)


def render(codes: np.ndarray) -> np.ndarray:
  return codes.reshape(1, 4, 4, 1).astype(np.uint8)


def run(gpt, scenario, *, slots=2, places=100, render=render):
  """Runs `scenario(worker)` in an event loop, with a worker that is ready."""

  async def main():
    worker = Worker(Engine(gpt, slots, CHUNK), render, places)
    worker.start()
    try:
      while not worker.ready:
        assert worker.alive
        await asyncio.sleep(0.01)
      await asyncio.wait_for(scenario(worker), 60)
    finally:
      worker.stop()
    assert not worker.alive

  asyncio.run(main())


async def events(handle) -> list[Progress | Finished]:
  return [event async for event in handle]


async def until(condition) -> None:
  while not condition():
    await asyncio.sleep(0.002)


def idle(worker) -> bool:
  return not (worker.queued or worker.busy_slots) and worker.free_places == 100


def gated(function):
  """The function, which waits until the event beside it is set."""
  gate = threading.Event()

  def waits(*args):
    assert gate.wait(60)
    return function(*args)

  return waits, gate


def test_draws_what_sample_draws(gpt):
  async def scenario(worker):
    requests = [request(gpt, number) for number in range(9)]
    handles = [worker.submit(r) for r in requests]
    found = await asyncio.gather(*map(events, handles))
    for r, (*progress, finished) in zip(requests, found, strict=True):
      assert finished.codes.tolist() == drawn_alone(gpt, r)
      np.testing.assert_array_equal(finished.image, render(finished.codes[None])[0])
      assert [len(event.codes) for event in progress] == [4, 8, 12]
      assert progress[1].codes.tolist() == finished.codes[:8].tolist()
    await until(lambda: idle(worker))
    assert worker.codes_drawn == 9 * 16

  run(gpt, scenario)


def test_a_full_queue_refuses(gpt):
  async def scenario(worker):
    worker._engine.advance, asked = gated(worker._engine.advance)
    handles = []
    with pytest.raises(QueueFull):
      for number in range(50):
        handles.append(worker.submit(request(gpt, number)))
    assert 3 <= len(handles) <= 3 + 2 * 2 + 3
    asked.set()
    await asyncio.gather(*map(events, handles))

  run(gpt, scenario, places=3)


def test_who_gives_up_frees_its_place(gpt):
  """Waiting, drawing, and again after the end."""

  async def scenario(worker):
    handles = [worker.submit(request(gpt, number)) for number in range(60)]
    await anext(aiter(handles[0]))
    for handle in handles[::2] + handles[1::2]:
      handle.cancel()
      handle.cancel()
    await until(lambda: idle(worker))
    again = worker.submit(request(gpt, 7))
    assert (await events(again))[-1].codes.tolist() == drawn_alone(gpt, request(gpt, 7))
    again.cancel()
    assert idle(worker)

  run(gpt, scenario)


def test_rendering_does_not_hold_a_slot(gpt):
  slowly, seen = gated(render)

  async def scenario(worker):
    handles = [worker.submit(request(gpt, 6 * i + 1)) for i in range(3)]
    watching = [asyncio.create_task(events(handle)) for handle in handles]
    await until(lambda: worker.codes_drawn == 3 * 16 and not worker.busy_slots)
    assert worker.free_places < 100
    assert not any(task.done() for task in watching)
    seen.set()
    await asyncio.gather(*watching)

  run(gpt, scenario, slots=1, render=slowly)


def test_a_death_reaches_everybody(gpt):
  async def scenario(worker):
    dies, midway = gated(lambda: 1 / 0)
    turns = iter([worker._engine.advance])
    worker._engine.advance = lambda: next(turns, dies)()
    handles = [worker.submit(request(gpt, number)) for number in range(8)]
    await anext(aiter(handles[0]))
    midway.set()
    for handle in handles:
      with pytest.raises(WorkerDied, match="division"):
        await events(handle)
    assert not worker.alive and not worker.ready
    with pytest.raises(WorkerDied):
      await events(worker.submit(request(gpt, 1)))

  run(gpt, scenario, slots=8)


def test_a_failure_to_render_fails_one_request(gpt):
  def picky(codes):
    if codes[0].tolist() == drawn_alone(gpt, request(gpt, 1)):
      raise ValueError("not this one")
    return render(codes)

  async def scenario(worker):
    bad, good = (worker.submit(request(gpt, number)) for number in (1, 2))
    with pytest.raises(WorkerDied, match="not this one"):
      await events(bad)
    assert isinstance((await events(good))[-1], Finished)
    assert worker.ready and idle(worker)

  run(gpt, scenario, render=picky)


def test_stopping_tells_who_waits(gpt):
  async def scenario(worker):
    handle = worker.submit(request(gpt, 1))
    worker.stop()
    with pytest.raises(WorkerDied, match="stops"):
      await events(handle)

  run(gpt, scenario)


def test_stopping_tells_whose_image_waits_to_be_rendered(gpt):
  slowly, stopping = gated(render)

  async def scenario(worker):
    first, second = (worker.submit(request(gpt, number)) for number in (1, 3))
    await until(lambda: worker.codes_drawn == 2 * 16 and not worker.busy_slots)
    shutdown = worker._renderer.shutdown

    def shutdown_midway(**how):
      shutdown(wait=False, **how)
      stopping.set()
      shutdown()

    worker._renderer.shutdown = shutdown_midway
    worker.stop()
    assert isinstance((await events(first))[-1], Finished)
    with pytest.raises(WorkerDied, match="stops"):
      await events(second)
    assert idle(worker)

  run(gpt, scenario, render=slowly)
