"""The one training loop, for the tokenizer and for the transformer.

Order of a step: evaluate, save, next batch, step, log. A save therefore never
sees a batch drawn but not trained on, and the metrics of a step are read after
the next one was dispatched, so the devices do not wait for the host.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import time
from typing import Any

from absl import logging
from clu import parameter_overview
import jax
import numpy as np
import tqdm

from llamagen_jax.data.loader import Batch, Stream
from llamagen_jax.errors import RunFailed, Stopped
from llamagen_jax.parallel.hosts import StopSignal
from llamagen_jax.parallel.mesh import make_mesh, replicated
from llamagen_jax.training.checkpoint import Checkpoints
from llamagen_jax.training.metrics_log import MetricsLog
from llamagen_jax.training.profile import Profile
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.speed import Work, memory, speed
from llamagen_jax.training.state import abstract_state, init_state

Metrics = dict[str, jax.Array]
Step = Callable[[Any, Batch], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What a trainer's evaluation found."""

  metrics: dict[str, float]
  images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
  """All that the loop needs to know of what it trains."""

  init: Callable[[jax.Array], Any]  # key -> state with boxed parameters
  step: Step  # pure; compiled by the loop
  stream: Stream
  evaluate: Callable[[Any, jax.sharding.Mesh], Evaluation]
  export: Callable[[Any, pathlib.Path], None]  # writes the bundle of a state
  curves: tuple[str, ...]  # metrics that the loss curve shows
  # Step number -> the function that takes over there: what does not run yet is
  # not part of the compiled program.
  later: Mapping[int, Step] = dataclasses.field(default_factory=dict)
  # Fresh state -> the same with weights from elsewhere; not called on resuming.
  load: Callable[[Any], Any] | None = None
  max_skipped_in_a_row: int = (
    1  # steps in a row that may be skipped before the run fails
  )
  work: Work | None = None  # of a step, for the log

  def step_at(self, step: int) -> Step:
    begun = [start for start in self.later if start <= step]
    return self.later[max(begun)] if begun else self.step


def fit(
  task: Task,
  run: RunConfig,
  mesh_config: MeshConfig,
  workdir: pathlib.Path,
  config: dict[str, Any],
  profile: int = 0,
) -> Any:
  """Trains to `run.steps`, from the newest checkpoint of `workdir` if there is one.

  Leaves there: checkpoints, config.json, metrics.jsonl, event files, loss.png,
  the evaluation's images, and the finished model in `bundle`; with `profile`, a
  trace of so many steps in `profile`. Returns the state.
  """
  mesh = make_mesh(**dataclasses.asdict(mesh_config))
  with (
    jax.set_mesh(mesh),
    StopSignal() as stop,
    Checkpoints(workdir, run, config) as checkpoints,
  ):
    abstract = abstract_state(task.init, mesh)
    restored = checkpoints.restore(abstract)
    if restored is None:
      state, start = init_state(task.init, jax.random.key(run.seed), abstract), 0
      if task.load is not None:
        state = task.load(state)
    else:
      state, position = restored
      task.stream.check_position(position)
      start = position["next_step"]
    if jax.process_index() == 0:  # which holds a part of the values only
      parameter_overview.log_parameter_overview(state.params, include_stats=False)
    with (
      _Reporter(workdir, run, start, task) as reporter,
      Profile(workdir / "profile", profile, start) as trace,
    ):
      state = _train(
        task, run, mesh, state, abstract, start, checkpoints, reporter, stop, trace
      )
    task.export(state, workdir / "bundle")
  return state


def _train(task, run, mesh, state, abstract, start, checkpoints, reporter, stop, trace):
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  @functools.cache
  def compiled(step: Step):
    return jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))

  batches = task.stream.batches(mesh, start)
  pending = None  # (step, metrics) that the host has not looked at yet

  def flush_metrics():
    nonlocal pending
    if pending is not None:
      reporter.log(*pending, last_good=checkpoints.latest())
      pending = None

  for step in range(start, run.steps + 1):
    final = step == run.steps
    stopped = stop.should_stop(step) and not final
    if final or (step > start and run.eval_every and step % run.eval_every == 0):
      flush_metrics()
      reporter.log_evaluation(step, task.evaluate(state, mesh))
    if final or stopped or (step > start and step % run.save_every == 0):
      flush_metrics()  # a state is saved only once its loss is known to be finite
      force = final or stopped
      checkpoints.save(state, step, task.stream.position(step), force)
    if final:
      break
    if stopped:
      raise Stopped(f"stopped at step {step} and saved; resume with the same command")
    if trace.turns(step):
      flush_metrics()
      trace.turn()
    waited = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - waited
    state, metrics = compiled(task.step_at(step))(state, batch)
    flush_metrics()
    pending = step + 1, metrics, waited
  return state


class _Reporter:
  """Progress bar, log rows, curves and the check that losses are finite."""

  def __init__(self, workdir: pathlib.Path, run: RunConfig, start: int, task: Task):
    self._workdir, self._run, self._curves = workdir, run, task.curves
    self._batch_size = task.stream.batch_size
    self._give_up, self._work = task.max_skipped_in_a_row, task.work
    self._main = jax.process_index() == 0
    self._log = MetricsLog(workdir, start) if self._main else None
    self._bar = tqdm.tqdm(
      total=run.steps,
      initial=start,
      desc=workdir.name,
      unit="step",
      dynamic_ncols=True,
      disable=not self._main,
    )
    self._last = (start, time.perf_counter())
    self._waited = 0.0

  def __enter__(self) -> "_Reporter":
    return self

  def __exit__(self, *error) -> None:
    self._bar.close()
    if self._main:
      self._log.draw_curve(self._workdir / "loss.png", self._curves)
      self._log.close()

  def log(
    self, step: int, metrics: Metrics, waited: float, last_good: int | None
  ) -> None:
    loss = float(metrics["loss"])
    skipped = int(metrics.get("skipped_in_a_row", 0))
    if skipped:
      logging.warning("step %d skipped, loss %s; %d in a row", step, loss, skipped)
    if skipped and skipped >= self._give_up:
      raise RunFailed(
        f"{skipped} steps in a row were skipped, the last is {step}, loss {loss}"
      )
    for name in (n for n in metrics if n.endswith("loss") and not skipped):
      if not np.isfinite(value := float(metrics[name])):
        good = "none was saved" if last_good is None else f"step {last_good}"
        raise RunFailed(
          f"{name} is {value} at step {step}; last good checkpoint in"
          f" {self._workdir}: {good}"
        )
    self._bar.update()
    self._waited += waited
    if step % self._run.log_every and step != self._run.steps:
      return
    now, (last_step, last_time) = time.perf_counter(), self._last
    elapsed = now - last_time
    row = {name: float(value) for name, value in metrics.items()}
    row["step_seconds"] = elapsed / (step - last_step)
    row["steps_per_second"] = (step - last_step) / elapsed
    row["samples_per_second"] = row["steps_per_second"] * self._batch_size
    row["data_wait"] = self._waited / elapsed
    if self._work is not None:
      row |= speed(self._work, row["step_seconds"])
    row |= memory(jax.local_devices()[0])
    self._last, self._waited = (step, now), 0.0
    self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    if self._main:
      self._log.write(step, row)

  def log_evaluation(self, step: int, found: Evaluation) -> None:
    if not self._main:
      return
    metrics = {f"eval/{name}": value for name, value in found.metrics.items()}
    self._log.write(step, metrics)
    for name, image in found.images.items():
      self._log.write_image(step, name, image)
    self._log.draw_curve(self._workdir / "loss.png", self._curves)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
    self._bar.write(f"step {step}  {shown}")
    logging.info("step %d evaluation %s", step, metrics)
