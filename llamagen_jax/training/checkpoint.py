"""Checkpoints of {state, data position, config}: all uses of Orbax's manager."""

import json
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from llamagen_jax.errors import RunFailed, UserError
from llamagen_jax.training.recipe import RunConfig

CONFIG = "config.json"
STEP_FOLDERS = {"step_prefix": "step", "step_format_fixed_length": 9}
ITEMS = ("state", "position", "config")
SIZES = "sizes.json"  # of a checkpoint: the bytes of every file, written last
UNREADABLE = "unreadable_"  # put before the name of a checkpoint that is not whole
# A run may go on with another of these; everything else decides its numbers.
MAY_CHANGE_ON_RESUME = (
  "mesh",
  "run.steps",
  "run.log_every",
  "run.eval_every",
  "run.save_every",
  "run.keep_last",
  "run.keep_every",
  "data.workers",
  "data.max_bad_share",
)


class Checkpoints:
  """The checkpoints of one work folder; saving is asynchronous and atomic.

  A checkpoint whose files are not what was written is set aside, visibly, and the
  one before it is taken.
  """

  def __init__(self, workdir: os.PathLike, run: RunConfig, config: dict[str, Any]):
    workdir = epath.Path(workdir)
    self._config = json.loads(json.dumps(config))  # as it will be read back
    _check_or_write_config(workdir, self._config)
    self._folder = _checkpoint_folder(workdir)
    _set_damaged_aside(self._folder)
    self._saving = 0
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        save_interval_steps=run.save_every,
        max_to_keep=run.keep_last,
        keep_period=run.keep_every or None,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=lambda: _write_sizes(self._folder, self._saving)
        ),
        **STEP_FOLDERS,
      ),
      item_names=ITEMS,
    )

  def restore(self, abstract: Any) -> tuple[Any, dict[str, int]] | None:
    """The newest readable (state, data position), placed as `abstract` says."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            position=ocp.args.JsonRestore(),
          ),
        )
      except (ValueError, OSError) as error:
        # One host cannot go back alone: the others wait for it in a barrier.
        if jax.process_count() > 1 or step == steps[-1]:
          raise RunFailed(
            f"checkpoint of step {step} in {self._folder} cannot be read:"
            f" {_one_line(error)}"
          ) from error
        logging.warning("checkpoint of step %d: %s", step, _one_line(error))
        _quarantine(self._folder / _step_folder(step), "it cannot be read")
        self._manager.reload()
        continue
      logging.info("resumed from step %d", step)
      return restored.state, restored.position
    return None

  def save(self, state: Any, step: int, position: dict[str, int], force: bool) -> None:
    """Saves if the step is due, or in any case where `force` is set."""
    if step == self._manager.latest_step():
      return
    self._manager.wait_until_finished()
    self._saving = step
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        position=ocp.args.JsonSave(position),
        config=ocp.args.JsonSave(self._config),
      ),
      force=force,
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error) -> None:
    """Waits for the save under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_part(workdir: os.PathLike, wanted: Any) -> Any:
  """Part of the state in another run's newest checkpoint, for a fresh start.

  Args:
    wanted: nested dicts of the arrays to read, named as in that run's state; only
      their shapes, dtypes and places matter.
  """
  workdir = epath.Path(workdir)
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    wanted,
  )
  with ocp.CheckpointManager(
    _checkpoint_folder(workdir),
    options=ocp.CheckpointManagerOptions(**STEP_FOLDERS, read_only=True),
    item_names=ITEMS,
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{workdir}: no finished checkpoint to start from")
    stored = ocp.args.PyTreeRestore(
      abstract, ocp.checkpoint_utils.construct_restore_args(abstract),
      partial_restore=True,
    )  # fmt: skip
    try:
      restored = manager.restore(step, args=ocp.args.Composite(state=stored))
    except (ValueError, KeyError) as error:
      reason = " ".join(str(error).split())[:300]
      raise UserError(
        f"{workdir}: the checkpoint of step {step} does not fit this config: {reason}"
      ) from error
  logging.info("starts from the weights of step %d in %s", step, workdir)
  return restored.state


def _check_or_write_config(workdir: epath.Path, config: dict[str, Any]) -> None:
  """Writes the config on the first start, and refuses another one later."""
  path = workdir / CONFIG
  if path.exists():
    found, wanted = (_flat(c) for c in (json.loads(path.read_text()), config))
    for name in sorted(found.keys() | wanted.keys()):
      free = any(name == f or name.startswith(f"{f}.") for f in MAY_CHANGE_ON_RESUME)
      if not free and found.get(name) != wanted.get(name):
        raise UserError(
          f"workdir {workdir} holds a run with config.{name}={found.get(name)!r},"
          f" this one has {wanted.get(name)!r}: use another workdir"
        )
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(config, indent=1))
    part.replace(path)


def _checkpoint_folder(workdir: epath.Path) -> epath.Path:
  folder = workdir / "checkpoints"
  return folder if folder.is_absolute() else folder.absolute()  # gs:// is absolute


def _step_folder(step: int) -> str:
  return f"step_{step:09d}"


def _write_sizes(folder: epath.Path, step: int) -> None:
  """Into the checkpoint that is about to be committed, still under its first name."""
  if jax.process_index() == 0:
    for place in folder.glob(f"{_step_folder(step)}*"):
      (place / SIZES).write_text(json.dumps(_sizes(place)))


def _sizes(place: epath.Path) -> dict[str, int]:
  sizes, folders = {}, [place]
  while folders:  # epath has no recursive glob
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      # Orbax completes its own metadata after the sizes were taken.
      elif path.name not in (SIZES, "_CHECKPOINT_METADATA"):
        sizes[str(path.relative_to(place))] = path.stat().length
  return sizes


def _set_damaged_aside(folder: epath.Path) -> None:
  """Host 0 compares the files of the newest checkpoints with their sizes."""
  if jax.process_index() == 0 and folder.exists():
    for place in sorted(folder.glob("step_" + "[0-9]" * 9), reverse=True):
      damage = _damage(place)
      if damage is None:
        break
      _quarantine(place, damage)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("checkpoints were looked at")


def _damage(place: epath.Path) -> str | None:
  record = place / SIZES
  if not record.exists():
    return None  # of an earlier version, or written by hand: reading it will tell
  found = _sizes(place)
  for name, size in json.loads(record.read_text()).items():
    if found.get(name) != size:
      return f"{name} has {found.get(name, 'no')} bytes, expected {size}"
  return None


def _quarantine(place: epath.Path, damage: str) -> None:
  aside = place.parent / f"{UNREADABLE}{place.name}"
  if aside.exists():
    aside.rmtree()
  place.rename(aside)
  logging.warning(
    "checkpoint %s is damaged (%s): kept as %s, falling back to the one before",
    place, damage, aside.name,
  )  # fmt: skip


def _one_line(error: object) -> str:
  return " ".join(str(error).split())[:300]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
