"""Checkpoints of {state, data position, config, model}: all uses of Orbax's manager."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import threading
from typing import Any, TypeVar

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp

from llamagen_jax.errors import RunFailed, UserError
from llamagen_jax.storage import in_bucket, read_json, write_json
from llamagen_jax.training import checkpoint_files as files
from llamagen_jax.training.recipe import RunConfig

T = TypeVar("T")

CONFIG = "config.json"
STEP_FOLDERS = {"step_prefix": "step", "step_format_fixed_length": 9}
# `model` is what a bundle of the weights says besides their shape, as JSON.
ITEMS = ("state", "position", "config", "model")
# Fields of a config that a resumed run may have other values of; the log says so.
# Everything else decides the numbers of a run, and another value is refused.
MAY_CHANGE_ON_RESUME = (
  "mesh",
  "model.attention",  # another kernel rounds otherwise
  "model.kv_cache",  # of sampling alone
  "guard",
  "images",
  "optimizer.lr",
  "optimizer.clip",
  "discriminator_optimizer.lr",
  "discriminator_optimizer.clip",
  "run.steps",  # not below the saved step
  "run.log_every",
  "run.eval_every",
  "run.save_every",
  "run.keep_last",
  "run.keep_every",
  "run.tracker",
  "data.workers",
  "data.max_bad_share",
)


class Checkpoints:
  """The checkpoints of one workdir; saving is asynchronous and atomic.

  A checkpoint whose files do not have the sizes or checksums that were written is
  renamed to `unreadable_...`, and the one before it is taken. Storage that does not
  answer is asked again, and then ends the run: no checkpoint is renamed for it.
  """

  def __init__(
    self,
    workdir: os.PathLike,
    run: RunConfig,
    config: dict[str, Any],
    recipe: Callable[[dict[str, Any]], Any],
  ):
    self._workdir, self._run, self._recipe = epath.Path(workdir), run, recipe
    self._config = json.loads(json.dumps(config))  # as it will be read back
    self._model: dict[str, Any] = {}
    self._folder = files.checkpoint_folder(self._workdir)
    self.previous = self._previous_config()
    files.quarantine_damaged(self._folder)
    self._saving, self._failed = 0, False
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        save_interval_steps=run.save_every,
        max_to_keep=run.keep_last,
        keep_period=run.keep_every or None,
        cleanup_tmp_directories=True,  # of saves that a kill cut short
        async_options=ocp.AsyncOptions(
          post_finalization_callback=lambda: files.write_sizes(
            self._folder, self._saving
          ),
          barrier_sync_fn=_wait_for_hosts,
        ),
        **STEP_FOLDERS,
      ),
      item_names=ITEMS,
    )

  def _previous_config(self) -> dict[str, Any] | None:
    """Returns the config of the run to resume, None where there is none.

    Raises:
      UserError: a field that may not change has changed, or does not exist any more.
    """
    path = self._workdir / CONFIG
    if not (path.exists() and files.saved_steps(self._folder)):
      return None
    previous = read_json(path)
    try:
      changes = self._changes(previous)
    except UserError as error:
      raise UserError(f"{path}: {error}: use another workdir") from error
    for name, old, new in changes:
      free = any(name == f or name.startswith(f"{f}.") for f in MAY_CHANGE_ON_RESUME)
      if not free:
        raise UserError(
          f"workdir {self._workdir} holds a run with config.{name}={old!r},"
          f" this one has {new!r}: use another workdir"
        )
    return previous

  def _changes(self, previous: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, old, new) of every field that differs.

    A field that a config does not have, as it is younger, has its default.
    """
    old, new = (
      _flat(dataclasses.asdict(self._recipe(c))) for c in (previous, self._config)
    )
    return [(n, old[n], new[n]) for n in sorted(new) if old[n] != new[n]]

  def begin(self, model: dict[str, Any]) -> None:
    """Writes config.json: from here on the workdir belongs to this config.

    Args:
      model: stored with every checkpoint, for a bundle of its weights.
    """
    self._model = model
    if jax.process_index() == 0:
      self._workdir.mkdir(parents=True, exist_ok=True)
      write_json(self._workdir / CONFIG, self._config)

  def restore(self, abstract: Any) -> tuple[Any, dict[str, int]] | None:
    """Returns the newest readable (state, data position), sharded as `abstract` is."""
    while (step := self._manager.latest_step()) is not None:
      if step > self._run.steps:
        raise UserError(
          f"run.steps={self._run.steps}: the newest checkpoint in {self._workdir} is"
          f" of step {step}; expected run.steps >= {step}"
        )
      try:
        restored = files.with_retries(
          lambda step=step: self._manager.restore(
            step,
            args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              position=ocp.args.JsonRestore(),
            ),
          ),
          f"checkpoint of step {step}",
        )
      except (ValueError, OSError) as error:
        folder = self._folder / files.step_folder(step)
        damage = files.damage_of(folder) or files.damage_in(error)
        # One host cannot go back alone: the others wait for it in a barrier.
        if damage is None or jax.process_count() > 1:
          raise RunFailed(
            f"checkpoint of step {step} in {self._folder} cannot be read:"
            f" {files.one_line(error)}"
          ) from error
        files.quarantine(folder, damage)
        self._manager.reload()
        continue
      for name, old, new in self._changes(self.previous or self._config):
        logging.info("config.%s: %r -> %r from step %d on", name, old, new, step)
      return restored.state, restored.position
    return None

  def save(self, state: Any, step: int, position: dict[str, int], force: bool) -> None:
    """Saves if the step is due, or in any case where `force` is set.

    Raises:
      RunFailed: this save or the one before it could not be finished.
    """
    if step == self._manager.latest_step():
      return
    self.finish()
    self._saving = step
    self._check_space(state)
    with self._one_line_errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          position=ocp.args.JsonSave(position),
          config=ocp.args.JsonSave(self._config),
          model=ocp.args.JsonSave(self._model),
        ),
        force=force,
      )

  def _check_space(self, state: Any) -> None:
    """Refuses to begin what the disk cannot hold: an error in between is not one line.

    Orbax and TensorStore print tracebacks of all their threads then.
    """
    if in_bucket(self._folder):
      return
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if size > free:
      raise RunFailed(
        f"checkpoint of step {self._saving} takes {size / 2**30:.3g} GiB, the disk of"
        f" {self._folder} has {free / 2**30:.3g} left; last good checkpoint:"
        f" {self._last_good()}"
      )

  def _last_good(self) -> str:
    steps = files.saved_steps(self._folder)
    return f"step {max(steps)}" if steps else "none was saved"

  def finish(self) -> None:
    """Waits for the save under way; raises as `save` does."""
    with self._one_line_errors():
      self._manager.wait_until_finished()

  def latest(self) -> int | None:
    """Returns the step of the newest finished checkpoint."""
    return self._manager.latest_step()

  @contextlib.contextmanager
  def _one_line_errors(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      self._failed = True
      raise RunFailed(
        f"checkpoint of step {self._saving} in {self._folder} could not be saved"
        f" ({files.one_line(error)}); last good checkpoint: {self._last_good()}"
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    """Waits for the save under way; its failure does not hide another error."""
    if self._failed and jax.process_count() > 1:
      return  # to end all hosts: a barrier holds them
    try:
      self.finish()
    except RunFailed:
      if kind is None:
        raise
    finally:
      with contextlib.suppress(OSError, ValueError, RuntimeError):
        self._manager.close()


def _wait_for_hosts(*, key: str, timeout_ms: int) -> None:
  """Waits in a barrier until all hosts have come; raises where this one has failed.

  After a failure Orbax 0.12 goes to a barrier, in a `finally`, before it tells of the
  error; the other hosts are in another barrier, and all would wait for 20 minutes. The
  main thread may save because of an error of something else: its saves raise at once.
  """
  failure = sys.exc_info()[1]
  if failure is not None and threading.current_thread() is not threading.main_thread():
    raise failure
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def restore_items(
  workdir: os.PathLike, wanted: Callable[[dict[str, Any]], Any], step: int | None = None
) -> tuple[int, dict[str, Any], Any]:
  """Reads a part of the state in a run's checkpoint, while the run may go on.

  Args:
    workdir: of the run.
    wanted: {config, model} of the checkpoint -> nested dicts of abstract arrays with
      shardings, named as in that run's state.
    step: of the checkpoint; None = the newest.

  Returns:
    the step, {config, model}, and the arrays.

  Raises:
    UserError: there is no such checkpoint, or its arrays have other shapes.
  """
  workdir = epath.Path(workdir)
  with ocp.CheckpointManager(
    files.checkpoint_folder(workdir),
    options=ocp.CheckpointManagerOptions(**STEP_FOLDERS, read_only=True),
    item_names=ITEMS,
  ) as manager:
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
      saved = ", ".join(map(str, sorted(steps))) or "none"
      asked = "no finished checkpoint" if step is None else f"no checkpoint of {step=}"
      raise UserError(f"{workdir}: {asked}; saved: {saved}")
    step = max(steps) if step is None else step
    items = ocp.args.Composite(
      config=ocp.args.JsonRestore(), model=ocp.args.JsonRestore()
    )
    about = dict(
      files.with_retries(lambda: manager.restore(step, args=items), "checkpoint")
    )
    abstract = wanted(about)
    stored = ocp.args.PyTreeRestore(
      abstract, ocp.checkpoint_utils.construct_restore_args(abstract),
      partial_restore=True,
    )  # fmt: skip
    args = ocp.args.Composite(state=stored)
    try:
      restored = files.with_retries(
        lambda: manager.restore(step, args=args), "checkpoint"
      )
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{workdir}: the checkpoint of step {step} does not fit this config:"
        f" {files.one_line(error)}"
      ) from error
  return step, about, restored.state


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
