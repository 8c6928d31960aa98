"""The thread that generates: order, giving up, the end, and its death."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from llamagen_jax.serving.engine import Engine
from llamagen_jax.serving.worker import (
  Finished,
  Progress,
  QueueFull,
  Worker,
  WorkerDied,
)
from tests.serving.engine_test import CLASSES, generated_alone, request, transformer
from tests.serving.fake import FakeEngine

CHUNK = 4
QUEUE = 100


@pytest.fixture(scope="module")
def gpt():
  return transformer(CLASSES)


class GatedEngine(Engine):
  """An engine whose chunks wait for a gate, and which can be made to fail."""

  def __init__(self, gpt, slots: int):
    super().__init__(gpt, slots, CHUNK)
    self.gate, self.turns, self.fails_at = threading.Event(), 0, None
    self.gate.set()

  def warm_up(self) -> None:
    super().warm_up()
    self.turns = 0

  def advance(self):
    assert self.gate.wait(60)
    self.turns += 1
    if self.turns == self.fails_at:
      raise ZeroDivisionError("division by zero")
    return super().advance()


def render(codes: np.ndarray) -> np.ndarray:
  return codes.reshape(1, 4, 4, 1).astype(np.uint8)


class GatedRender:
  """`render`, which waits for a gate."""

  def __init__(self):
    self.gate, self.started = threading.Event(), threading.Event()

  def __call__(self, codes: np.ndarray) -> np.ndarray:
    self.started.set()
    assert self.gate.wait(60)
    return render(codes)


def run(gpt, scenario, *, slots=2, queue=QUEUE, render=render):
  """Runs `scenario(worker, engine)` in an event loop, when the worker is ready."""

  async def main():
    engine = GatedEngine(gpt, slots)
    worker = Worker(engine, render, queue)
    worker.start()
    try:
      while not worker.ready:
        assert worker.alive
        await asyncio.sleep(0.01)
      await asyncio.wait_for(scenario(worker, engine), 60)
    finally:
      engine.gate.set()
      await asyncio.to_thread(worker.stop)
    assert not worker.alive

  asyncio.run(main())


async def events(handle) -> list[Progress | Finished]:
  return [event async for event in handle]


async def until(condition) -> None:
  while not condition():
    await asyncio.sleep(0.002)


def idle(worker) -> bool:
  free = worker.free_places == QUEUE + worker.slots
  return free and not (worker.queued or worker.busy_slots)


def test_has_the_codes_of_sample(gpt):
  async def scenario(worker, engine):
    requests = [request(gpt, number) for number in range(9)]
    found = await asyncio.gather(*map(events, worker.submit(requests)))
    for r, (*progress, finished) in zip(requests, found, strict=True):
      assert finished.codes.tolist() == generated_alone(gpt, r)
      np.testing.assert_array_equal(finished.image, render(finished.codes[None])[0])
      assert [len(event.codes) for event in progress] == [4, 8, 12]
      assert progress[1].codes.tolist() == finished.codes[:8].tolist()
    await until(lambda: idle(worker))
    assert worker.codes_sampled == 9 * 16

  run(gpt, scenario)


def test_places_are_the_queue_and_the_free_slots(gpt):
  async def scenario(worker, engine):
    engine.gate.clear()
    assert worker.capacity == worker.free_places == 3 + 2
    guided = [request(gpt, 6 * i + 1) for i in range(6)]
    with pytest.raises(QueueFull):
      worker.submit(guided)  # all or none
    assert worker.free_places == 5
    handles = worker.submit(guided[:5])
    with pytest.raises(QueueFull):
      worker.submit(guided[5:])
    engine.gate.set()
    await asyncio.gather(*map(events, handles))
    await until(lambda: worker.free_places == 5)

  run(gpt, scenario, queue=3)


def test_an_image_that_is_rendered_holds_no_place(gpt):
  slow = GatedRender()

  async def scenario(worker, engine):
    first = worker.submit([request(gpt, 6 * i + 1) for i in range(2)])
    await asyncio.to_thread(slow.started.wait, 60)
    await until(lambda: not worker.busy_slots and not worker.queued)
    await until(lambda: worker.free_places == 5)
    second = worker.submit([request(gpt, 6 * i + 1) for i in range(2, 5)])
    await until(lambda: worker.codes_sampled == 5 * 16)
    # More wait for the renderer than there are slots: then they count.
    await until(lambda: worker.free_places == 2)
    slow.gate.set()
    await asyncio.gather(*map(events, first + second))

  run(gpt, scenario, queue=3, render=slow)


def test_who_gives_up_frees_its_place(gpt):
  """Waiting, in a slot, and again after the end."""

  async def scenario(worker, engine):
    handles = worker.submit([request(gpt, number) for number in range(60)])
    await anext(aiter(handles[0]))
    for handle in handles[::2] + handles[1::2]:
      handle.cancel()
      handle.cancel()
    await until(lambda: idle(worker))
    [again] = worker.submit([request(gpt, 7)])
    codes = (await events(again))[-1].codes.tolist()
    assert codes == generated_alone(gpt, request(gpt, 7))
    again.cancel()
    await until(lambda: idle(worker))

  run(gpt, scenario)


def test_rendering_does_not_hold_a_slot(gpt):
  slow = GatedRender()

  async def scenario(worker, engine):
    handles = worker.submit([request(gpt, 6 * i + 1) for i in range(3)])
    watching = [asyncio.create_task(events(handle)) for handle in handles]
    await until(lambda: worker.codes_sampled == 3 * 16 and not worker.busy_slots)
    assert not any(task.done() for task in watching)
    slow.gate.set()
    await asyncio.gather(*watching)

  run(gpt, scenario, slots=1, render=slow)


def test_a_death_reaches_everybody(gpt):
  async def scenario(worker, engine):
    engine.fails_at = 3
    handles = worker.submit([request(gpt, number) for number in range(8)])
    assert isinstance(await anext(aiter(handles[0])), Progress)
    for handle in handles:
      with pytest.raises(WorkerDied, match="division"):
        await events(handle)
    assert not worker.alive and not worker.ready
    with pytest.raises(WorkerDied):
      await events(worker.submit([request(gpt, 1)])[0])

  run(gpt, scenario, slots=8)


def test_a_failure_to_render_fails_one_request(gpt):
  def picky(codes):
    if codes[0].tolist() == generated_alone(gpt, request(gpt, 1)):
      raise ValueError("not this one")
    return render(codes)

  async def scenario(worker, engine):
    bad, good = worker.submit([request(gpt, number) for number in (1, 2)])
    with pytest.raises(WorkerDied, match="not this one"):
      await events(bad)
    assert isinstance((await events(good))[-1], Finished)
    assert worker.ready and idle(worker)

  run(gpt, scenario, render=picky)


def test_stopping_tells_who_waits(gpt):
  async def scenario(worker, engine):
    [handle] = worker.submit([request(gpt, 1)])
    await asyncio.to_thread(worker.stop)
    with pytest.raises(WorkerDied, match="stops"):
      await events(handle)

  run(gpt, scenario)


def test_stopping_tells_whose_image_waits_to_be_rendered(gpt):
  slow = GatedRender()

  async def scenario(worker, engine):
    first, second = worker.submit([request(gpt, number) for number in (1, 3)])
    await until(lambda: worker.codes_sampled == 2 * 16 and not worker.busy_slots)
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
    await until(lambda: not worker.alive)
    slow.gate.set()  # the first is being rendered, the second waits for that
    assert isinstance((await events(first))[-1], Finished)
    with pytest.raises(WorkerDied, match="stops"):
      await events(second)
    await stopping

  run(gpt, scenario, render=slow)


class OneEdit(FakeEngine):
  """A fake that runs one edit at a time beside its slots, as the engine does."""

  def join(self, request):
    edits = [r for r in self._running if r.known is not None]
    return not (request.known is not None and edits) and super().join(request)


def test_an_edit_that_waits_holds_up_nobody_else(gpt):
  def edit(number):
    r = request(gpt, number)
    return dataclasses.replace(
      r, known=np.zeros(4, np.int32), is_known=np.eye(4)[0] > 0
    )

  async def main():
    engine = OneEdit(4, slots=3)
    worker = Worker(engine, lambda codes: codes[:, None, None, None], QUEUE)
    worker.start()
    await until(lambda: worker.ready)
    asked = [edit(0), edit(1), edit(2), request(gpt, 3)]
    await asyncio.gather(*map(events, worker.submit(asked)))
    await asyncio.to_thread(worker.stop)
    assert engine.requests == [asked[0], asked[3], asked[1], asked[2]] or (
      engine.requests == [asked[3], asked[0], asked[1], asked[2]]
    )

  asyncio.run(main())
