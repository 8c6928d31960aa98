"""Checkpoints of {state, data position, config}: all uses of Orbax's manager."""

import json
import pathlib
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp

from llamagen_jax.errors import UserError
from llamagen_jax.training.recipe import RunConfig

CONFIG = "config.json"
STEP_FOLDERS = {"step_prefix": "step", "step_format_fixed_length": 9}
ITEMS = ("state", "position", "config")
# A run may go on with another of these; everything else decides its numbers.
FREE = (
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
  """The checkpoints of one work folder; saving is asynchronous and atomic."""

  def __init__(self, workdir: pathlib.Path, run: RunConfig, config: dict[str, Any]):
    self._config = json.loads(json.dumps(config))  # as it will be read back
    _claim(workdir, self._config)
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(
        save_interval_steps=run.save_every,
        max_to_keep=run.keep_last,
        keep_period=run.keep_every or None,
        **STEP_FOLDERS,
      ),
      item_names=ITEMS,
    )

  def restore(self, abstract: Any) -> tuple[Any, dict[str, int]] | None:
    """The newest (state, data position), placed as `abstract` says, if any."""
    step = self._manager.latest_step()
    if step is None:
      return None
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        position=ocp.args.JsonRestore(),
      ),
    )
    logging.info("resumed from step %d", step)
    return restored.state, restored.position

  def save(self, state: Any, step: int, position: dict[str, int], force: bool) -> None:
    """Saves if the step is due, or in any case where `force` is set."""
    if step == self._manager.latest_step():
      return
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


def restore_part(workdir: pathlib.Path, wanted: Any) -> Any:
  """Part of the state in another run's newest checkpoint, for a fresh start.

  Args:
    wanted: nested dicts of the arrays to read, named as in that run's state; only
      their shapes, dtypes and places matter.
  """
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    wanted,
  )
  with ocp.CheckpointManager(
    (workdir / "checkpoints").absolute(),
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


def _claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes the config on the first start, and refuses another one later."""
  path = workdir / CONFIG
  if path.exists():
    found, wanted = (_flat(c) for c in (json.loads(path.read_text()), config))
    for name in sorted(found.keys() | wanted.keys()):
      free = any(name == f or name.startswith(f"{f}.") for f in FREE)
      if not free and found.get(name) != wanted.get(name):
        raise UserError(
          f"workdir {workdir} holds a run with config.{name}={found.get(name)!r},"
          f" this one has {wanted.get(name)!r}: use another workdir"
        )
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(config, indent=1))
    part.rename(path)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
