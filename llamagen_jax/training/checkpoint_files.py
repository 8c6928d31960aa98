"""The files of checkpoints: which are there, which are whole, which are set aside."""

from collections.abc import Callable
import time
from typing import TypeVar

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils

from llamagen_jax.storage import in_bucket, is_transient, read_json, write_json

T = TypeVar("T")

SIZES = "sizes.json"  # of a checkpoint: the bytes of every file, written last
UNREADABLE = "unreadable_"  # put before the name of a checkpoint that is not whole
WAIT_SECONDS = (1, 4, 15, 60)
DAMAGED = ("DATA_LOSS", "checksum", "decod")  # in TensorStore's errors


def saved_steps(folder: epath.Path) -> list[int]:
  """Returns the steps of finished checkpoints."""
  if not folder.exists():
    return []
  found = folder.glob("step_" + "[0-9]" * 9)
  # In a bucket Orbax writes under the last name, and this file at the end.
  done = (p for p in found if not in_bucket(p) or (p / "commit_success.txt").exists())
  return [int(path.name[5:]) for path in done]


def checkpoint_folder(workdir: epath.Path) -> epath.Path:
  """Returns the folder of a run's checkpoints, absolute as Orbax wants it."""
  folder = workdir / "checkpoints"
  return folder if folder.is_absolute() else folder.absolute()  # gs:// is absolute


def step_folder(step: int) -> str:
  """Returns the name of a checkpoint's folder."""
  return f"step_{step:09d}"


def write_sizes(folder: epath.Path, step: int) -> None:
  """Writes SIZES into a checkpoint that is about to get its last name; host 0 does."""
  if jax.process_index() == 0:
    for path in folder.glob(f"{step_folder(step)}*"):
      write_json(path / SIZES, _sizes(path))


def _sizes(folder: epath.Path) -> dict[str, int]:
  sizes, folders = {}, [folder]
  while folders:  # epath has no recursive glob
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      # Orbax completes its own metadata after the sizes were taken.
      elif path.name not in (SIZES, "_CHECKPOINT_METADATA", f".{SIZES}.part"):
        sizes[str(path.relative_to(folder))] = path.stat().length
  return sizes


def quarantine_damaged(folder: epath.Path) -> None:
  """Sets damaged checkpoints aside, from the newest to the first whole one; host 0."""
  if jax.process_index() == 0:
    for step in sorted(saved_steps(folder), reverse=True):
      path = folder / step_folder(step)
      damage = with_retries(lambda path=path: damage_of(path), path.name)
      if damage is None:
        break
      quarantine(path, damage)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("checkpoints were looked at")


def damage_of(folder: epath.Path) -> str | None:
  """Returns which file of a checkpoint has not its size; None = all have."""
  record = folder / SIZES
  if not record.exists():
    return None  # of an earlier version, or written by hand: reading it will tell
  sizes = _sizes(folder)
  for name, size in read_json(record).items():
    if sizes.get(name) != size:
      return f"{name} has {sizes.get(name, 'no')} bytes, expected {size}"
  return None


def damage_in(error: Exception) -> str | None:
  """Returns the error's text where it says that bytes are not what was written."""
  return one_line(error) if any(word in str(error) for word in DAMAGED) else None


def quarantine(folder: epath.Path, damage: str) -> None:
  """Renames a checkpoint, so that it is never resumed from, and says so."""
  aside = folder.parent / f"{UNREADABLE}{folder.name}"
  if aside.exists():
    aside.rmtree()
  folder.rename(aside)
  logging.warning(
    "checkpoint %s is damaged (%s): kept as %s, falling back to the one before",
    folder, damage, aside.name,
  )  # fmt: skip


def one_line(error: object) -> str:
  """Returns the beginning of an error's text, without line breaks."""
  return " ".join(str(error).split())[:300]


def with_retries(read: Callable[[], T], name: str) -> T:
  """Returns `read()`, tried again after a while where storage does not answer."""
  for seconds in WAIT_SECONDS:
    try:
      return read()
    except (ValueError, OSError) as error:
      if not is_transient(error):
        raise
      logging.warning("%s: %s; again in %d s", name, one_line(error), seconds)
      time.sleep(seconds)
  return read()
