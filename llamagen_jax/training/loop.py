"""The one training loop, for the tokenizer and for the transformer.

Order of a step: evaluate, save, next batch, step, log. A save therefore never
sees a batch that was read but not trained on, and the metrics of a step are read after
the next one was dispatched, so the devices do not wait for the host.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import os
import time
from typing import Any

from absl import logging
from clu import parameter_overview
from etils import epath
import jax

from llamagen_jax.data.loader import Batch, Stream, check_position
from llamagen_jax.data.size_buckets import SizeBuckets
from llamagen_jax.errors import RunFailed, Stopped, UserError
from llamagen_jax.parallel.hosts import StopSignal
from llamagen_jax.parallel.mesh import make_mesh, replicated
from llamagen_jax.training.checkpoint import Checkpoints
from llamagen_jax.training.export import write_adapter, write_bundle
from llamagen_jax.training.profile import Profile
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.reporter import Evaluation, Reporter
from llamagen_jax.training.speed import Work
from llamagen_jax.training.state import (
  Metrics,
  abstract_state,
  init_state,
  shardings_of,
)

DETERMINISTIC = "--xla_gpu_deterministic_ops"

Step = Callable[[Any, Batch], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class Phase:
  """How the steps of a part of the run are computed; a compiled program of its own."""

  step: Step  # pure; compiled by the loop
  work: Work | None = None  # of a step, for the log


@dataclasses.dataclass(frozen=True)
class Task:
  """All that the loop needs to know of what it trains."""

  init: Callable[[jax.Array], Any]  # key -> state with boxed parameters
  # Of each bucket of the stream, by the step that each begins with; one begins with 0.
  phases: tuple[Mapping[int, Phase], ...]
  stream: Stream | SizeBuckets
  evaluate: Callable[[Any, jax.sharding.Mesh], Evaluation]
  # Mesh -> what a bundle of the weights says besides the config; see `write_bundle`.
  describe: Callable[[jax.sharding.Mesh], dict[str, Any]]
  curves: tuple[str, ...]  # metrics that the loss curve shows
  recipe: Callable[[dict[str, Any]], Any]  # config -> its dataclass, with all defaults
  # Recipe -> the learning rates by name, to log how a changed config changes them.
  schedules: Callable[[Any], dict[str, Callable[[int], Any]]]
  # Fresh state -> the same with weights from elsewhere; not called on resuming.
  load: Callable[[Any], Any] | None = None
  max_skipped_in_a_row: int = 1  # skipped steps in a row that end the run

  def phase_at(self, step: int) -> Phase:
    """Returns the phase that the step number belongs to."""
    phases = self.phases[self.stream.bucket(step)]
    return phases[max(start for start in phases if start <= step)]


def fit(
  task: Task,
  run: RunConfig,
  mesh_config: MeshConfig,
  workdir: os.PathLike,
  config: dict[str, Any],
  profile: int = 0,
) -> Any:
  """Trains to `run.steps`, from the newest checkpoint of `workdir` if there is one.

  Leaves there: checkpoints, config.json, metrics.jsonl, event files, loss.png,
  the evaluation's images, the finished model in `bundle` and, with LoRA, what it adds
  in `adapter`; with `profile`, a trace of so many steps. Returns the state.

  Raises:
    UserError: the config is not that of the run in `workdir`, or does not fit it.
    RunFailed: a loss, gradient or update is not finite, or data or storage failed.
    Stopped: SIGTERM or Ctrl-C; the state is saved.
  """
  workdir = epath.Path(workdir)
  mesh = make_mesh(**dataclasses.asdict(mesh_config))
  with (
    jax.set_mesh(mesh),
    StopSignal() as stop,
    Checkpoints(workdir, run, config, task.recipe) as checkpoints,
  ):
    abstract = abstract_state(task.init, mesh)
    state, start = _first_state(task, run, abstract, checkpoints)
    _log_run(task, state, mesh, checkpoints.previous, config)
    description = task.describe(mesh)
    batches = task.stream.batches(mesh, start)
    checkpoints.begin(description)
    with (
      Reporter(
        workdir, run, start, task.stream.batch_size, task.curves,
        task.max_skipped_in_a_row,
      ) as reporter,
      Profile(workdir / "profile", profile, start) as trace,
    ):  # fmt: skip
      loop = _Loop(task, run, mesh, checkpoints, reporter, stop, trace)
      state = loop.train(state, start, batches)
    checkpoints.finish()
    write_bundle(workdir / "bundle", config, description, state.weights)
    write_adapter(workdir / "adapter", config, description, state.weights)
  return state


def _first_state(
  task: Task, run: RunConfig, abstract: Any, checkpoints: Checkpoints
) -> tuple[Any, int]:
  """Returns the state to go on with, and the number of its next step."""
  restored = checkpoints.restore(abstract)
  if restored is not None:
    state, position = restored
    check_position(task.stream, position)
    logging.info("resumed from step %d of %d", position["next_step"], run.steps)
    exact = DETERMINISTIC in os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() == "gpu" and not exact:
      logging.warning(
        "on a GPU a resumed run is the uninterrupted one up to rounding; bit for bit"
        " with XLA_FLAGS=%s=true", DETERMINISTIC,
      )  # fmt: skip
    return state, position["next_step"]
  logging.info("no checkpoint to resume from: starts at step 0 of %d", run.steps)
  state = init_state(task.init, jax.random.key(run.seed), abstract)
  return state if task.load is None else task.load(state), 0


def _log_run(
  task: Task,
  state: Any,
  mesh: jax.sharding.Mesh,
  previous: dict[str, Any] | None,
  config: dict[str, Any],
) -> None:
  """Logs hosts, chips and parameters, and learning rates that a resume changes."""
  step = int(state.step)
  if previous is not None:
    old, new = (task.schedules(task.recipe(c)) for c in (previous, config))
    for name in old.keys() & new.keys():
      rates = float(old[name](step)), float(new[name](step))
      if rates[0] != rates[1]:
        logging.warning(
          "learning rate (%s) of step %d: %.3g -> %.3g", name, step, *rates
        )
  if jax.process_index() > 0:  # the others hold only a part of the values
    return
  logging.info(
    "%d hosts, %d devices (%s), mesh %s", jax.process_count(), jax.device_count(),
    jax.devices()[0].device_kind, dict(mesh.shape),
  )  # fmt: skip
  table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  logging.info("parameters:\n%s", table)


@dataclasses.dataclass
class _Loop:
  """The steps of a run, with all that they report to."""

  task: Task
  run: RunConfig
  mesh: jax.sharding.Mesh
  checkpoints: Checkpoints
  reporter: Reporter
  stop: StopSignal
  trace: Profile
  pending: tuple | None = None  # metrics of a step that the host has not looked at yet

  def train(self, state: Any, start: int, batches: Iterator[Batch]) -> Any:
    """Returns the state after step `run.steps`."""
    run, out = self.run, (shardings_of(state), replicated(self.mesh))

    @functools.cache
    def compiled(step: Step):
      return jax.jit(step, donate_argnums=0, out_shardings=out)

    begun: set[Step] = set()
    for step in range(start, run.steps + 1):
      final = step == run.steps
      stopped = self.stop.should_stop(step) and not final
      if final or (step > start and run.eval_every and step % run.eval_every == 0):
        self._flush_metrics()
        self.reporter.log_evaluation(step, self._evaluate(state, step))
      if final or stopped or (step > start and step % run.save_every == 0):
        self._save(state, step, force=final or stopped)
      if final:
        break
      if stopped:
        self.checkpoints.finish()
        raise Stopped(f"stopped at step {step} and saved; resume with the same command")
      if self.trace.turns(step):
        self._flush_metrics()
        self.trace.turn()
      waited = time.perf_counter()
      batch = self._next_batch(batches, state, step, save=step > start)
      waited = time.perf_counter() - waited
      phase = self.task.phase_at(step)
      if phase.step not in begun:
        begun.add(phase.step)
        logging.info("compiling the train step: a minute or more, kept for next time")
      state, metrics = compiled(phase.step)(state, batch)
      self._flush_metrics()
      self.pending = step + 1, metrics, waited, phase.work
    return state

  def _flush_metrics(self) -> None:
    if self.pending is not None:
      pending, self.pending = self.pending, None
      self.reporter.log(*pending, last_good=self.checkpoints.latest())

  def _save(self, state: Any, step: int, *, force: bool) -> None:
    self._flush_metrics()  # a state is saved only once it is known to be finite
    self.reporter.flush()  # before it: a resumed run cannot write the rows again
    position = self.task.stream.position(step)
    self.checkpoints.save(state, step, position, force)

  def _save_on_failure(self, state: Any, step: int) -> bool:
    """Saves before the run ends, and returns whether it did.

    With several hosts it does not: the others are not told to.
    """
    if jax.process_count() > 1:
      return False
    self._save(state, step, force=True)
    self.checkpoints.finish()
    return True

  def _evaluate(self, state: Any, step: int) -> Evaluation:
    """Returns the evaluation; where it fails, saves before the run ends."""
    try:
      return self.task.evaluate(state, self.mesh)
    except Exception:
      self._save_on_failure(state, step)
      raise

  def _next_batch(
    self, batches: Iterator[Batch], state: Any, step: int, *, save: bool
  ) -> Batch:
    """Returns the next batch; where the data fails, may save before the run ends."""
    try:
      return next(batches)
    except Exception as error:
      saved = ""
      if save and self._save_on_failure(state, step):
        saved = "; saved, resume with the same command"
      if isinstance(error, UserError):
        raise
      reason = " ".join(str(error).split())[:300]
      raise RunFailed(
        f"the data of step {step} failed ({type(error).__name__}: {reason}){saved}"
      ) from error
