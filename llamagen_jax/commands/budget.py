"""What a quickstart is of, and how much fits in its minutes: kept for a rerun."""

from collections.abc import Callable
import json
import pathlib
import statistics
import time
from typing import Any

from absl import logging
import jax
import ml_collections

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.storage import read_json, write_json
from llamagen_jax.training.loop import Task
from llamagen_jax.training.recipe import build
from llamagen_jax.training.state import abstract_state, init_state
from llamagen_jax.weights import bundle

CHOICES = "choices.json"
MARGIN = 0.85  # of its time that a training fills by plan
TIMED_STEPS = 5
FEWEST_STEPS = 20


class Choices:
  """What was asked for and chosen so far, in choices.json: a rerun keeps to it."""

  def __init__(self, workdir: pathlib.Path, asked: dict[str, Any]):
    asked = json.loads(json.dumps(asked))  # as it is read again: tuples are lists
    self._path = workdir / CHOICES
    self._values = read_json(self._path) if self._path.exists() else asked
    for name, value in asked.items():
      if self._values.get(name) != value:
        raise UserError(
          f"--workdir={workdir} holds a run with {name}={self._values.get(name)}, not"
          f" {value}: choose another workdir, or the same {name}"
        )
    if not self._path.exists():
      workdir.mkdir(parents=True, exist_ok=True)
      write_json(self._path, self._values)

  def get(self, name: str, choose: Callable[[], Any]) -> Any:
    """Returns a choice, made by `choose` the first time."""
    if name not in self._values:
      self._values[name] = choose()
      write_json(self._path, self._values)
    return self._values[name]


def train(
  folder: pathlib.Path,
  trainer: Any,
  recipe: type,
  config: Callable[[int], ml_collections.ConfigDict],
  choices: Choices,
  steps: Callable[[Task], int],
) -> None:
  """Trains into a folder, where that is not done yet.

  Args:
    trainer: `training.train_gpt` or `training.train_tokenizer`.
    recipe: what that trainer's configs are built into.
    config: makes the config for a number of steps.
    steps: how many steps to train a task; asked once, and kept among the choices.
  """
  if (folder / "bundle" / bundle.CONFIG).exists():
    return

  def choose() -> int:
    return steps(trainer.make_task(build(recipe, _quiet(config))))

  trainer.train(config(choices.get(f"{folder.name}_steps", choose)), folder)


def _quiet(config: Callable[[int], Any]) -> ml_collections.ConfigDict:
  """Returns a config for timing steps, without a word about its choices."""
  logger = logging.get_absl_logger()
  level = logger.level  # not absl's verbosity, which is the root's where none was set
  logger.setLevel("WARNING")
  try:
    return config(FEWEST_STEPS)
  finally:
    logger.setLevel(level)


def steps_in_time(name: str, task: Task, seconds: float, most: int) -> int:
  """Returns how many steps a training takes in `seconds`, at most `most`."""
  of_a_step = seconds_a_step(task)
  steps = max(FEWEST_STEPS, min(int(MARGIN * seconds / of_a_step), most))
  logging.info("%s: %.2f s a step, so %d steps", name, of_a_step, steps)
  return steps


def seconds_a_step(task: Task) -> float:
  """Returns the median time of a few steps, compiled before, on the first batch."""
  mesh = make_mesh()
  logging.info("timing a few steps; compiling them first")
  with jax.set_mesh(mesh):
    abstract = abstract_state(task.init, mesh)
    state = init_state(task.init, jax.random.key(0), abstract)
    batch = next(task.stream.batches(mesh, 0))
    step, times = jax.jit(task.phase_at(0).step, donate_argnums=0), []
    for _ in range(1 + TIMED_STEPS):
      started = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      times.append(time.perf_counter() - started)
  return statistics.median(times[1:])
