"""Shards that several hosts write: host i does shards i, i + hosts, i + 2 hosts, ...

The hosts share the folder, or have one each on a disk of their own. In that case all
files have to be copied into one folder, where the same command on one host has only
the manifest left to write.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

from absl import logging
import jax
import tqdm

from llamagen_jax.data.shards import MANIFEST, PLAN, ShardWriter, read_manifest
from llamagen_jax.errors import Stopped
from llamagen_jax.parallel.independent import StopRequest, gather
from llamagen_jax.storage import in_bucket


def write_own_shards(
  writer: ShardWriter,
  sizes: Sequence[int],
  write: Callable[[int, tqdm.tqdm], None],
  finish: Callable[[], Mapping[str, Any] | None],
  *,
  unit: str,
) -> Mapping[str, Any] | None:
  """Writes this host's shards that are not done yet, and at the end the manifest.

  Args:
    writer: of the folder.
    sizes: samples of every shard.
    write: writes the shard of a number and moves the progress bar on.
    finish: writes the manifest, or returns None while shards are missing.
    unit: of the samples, for the progress bar.

  Returns:
    the manifest, or None where other hosts' shards lie in folders of their own.

  Raises:
    Stopped: this host or another one was told to stop. Finished shards are kept.
  """
  mine = range(jax.process_index(), writer.shards, jax.process_count())
  todo = [index for index in mine if not writer.is_done(index)]
  _say_if_not_shared(writer)
  done = sum(sizes[i] for i in mine) - sum(sizes[i] for i in todo)
  left = 0
  with StopRequest() as stop:
    with tqdm.tqdm(
      total=sum(sizes[i] for i in mine), initial=done, desc="shards", unit=unit,
      dynamic_ncols=True, disable=jax.process_index() > 0,
    ) as bar:  # fmt: skip
      for number, index in enumerate(todo):
        if stop.is_set():
          left = len(todo) - number
          break
        write(index, bar)
    # The coordinator must not end while others write a shard.
    if any(gather("written", "stopped" if left else "", stop)):
      raise Stopped(
        f"stopped with {left} shards of this host left; resume with the same command"
      )
  manifest = finish() if jax.process_index() == 0 else None
  finished = gather("finished", "" if manifest is None else MANIFEST)[0] == MANIFEST
  if jax.process_index() and finished and (writer.folder / MANIFEST).exists():
    return read_manifest(writer.folder, writer.kind)
  return manifest


def copy_hint(out: str) -> str:
  """Returns what a user of hosts without a shared folder has to do with `out`."""
  return (
    f"this host's shards are in {out}: copy those of all hosts into one folder,"
    " and run this command on it once more, on one host"
  )


def _say_if_not_shared(writer: ShardWriter) -> None:
  gather("planned")
  plan = ""
  if not in_bucket(writer.folder):
    found = os.stat(writer.folder / PLAN)
    plan = f"{found.st_ino} {found.st_mtime_ns}"
  if len(set(gather("plans", plan))) > 1 and jax.process_index() == 0:
    logging.warning(
      "%s is another folder on every host: each writes shards of its own there. Copy"
      " them into one folder at the end, and run this command on it once more, on one"
      " host",
      writer.folder,
    )
