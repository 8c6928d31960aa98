"""Folders of shards that several processes write and a kill cannot spoil.

`plan.json` says what every shard has in common. A shard is written under hidden
names, renamed, and vouched for by a small JSON file until `manifest.json`, which
is written last, takes over all of these. A folder without it is not finished.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import pathlib
from typing import Any
import uuid

from llamagen_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"


class ShardWriter:
  """A folder that is being written; every shard by one process at a time."""

  def __init__(self, folder: str | pathlib.Path, plan: Mapping[str, Any], shards: int):
    """Begins the folder, or goes on with one that was begun by the same plan."""
    self.folder, self.shards = pathlib.Path(folder), shards
    self.folder.mkdir(parents=True, exist_ok=True)
    self._plan = as_json({"format": FORMAT_VERSION, **plan})
    path = self.folder / PLAN
    found = json.loads(path.read_text()) if path.exists() else self._plan
    for name in self._plan.keys() | found.keys():
      if found.get(name) != self._plan.get(name):
        raise UserError(
          f"{self.folder} was begun with other settings: {name} is"
          f" {found.get(name)!r} there, {self._plan.get(name)!r} here; choose another"
          " folder"
        )
    write_json(path, self._plan)

  def file_name(self, kind: str, index: int) -> str:
    return f"{kind}-{index:05d}-of-{self.shards:05d}.array_record"

  def part(self, name: str) -> pathlib.Path:
    """Where a file is written until its shard is whole."""
    return self.folder / f".{name}.part"

  def is_done(self, index: int) -> bool:
    return self.is_finished() or self._info(index).exists()

  def is_finished(self) -> bool:
    return (self.folder / MANIFEST).exists()

  def commit(self, index: int, files: Mapping[str, str], info: dict[str, Any]) -> None:
    """Renames the parts of a shard's files {kind: name} and vouches for them."""
    described = {}
    for kind, name in files.items():
      part = self.part(name)
      size = part.stat().st_size
      described[kind] = {"file": name, "bytes": size, "sha256": sha256(part)}
      part.rename(self.folder / name)
    write_json(self._info(index), {"files": described, **info})

  def finish(
    self, totals: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
  ) -> dict[str, Any] | None:
    """Writes the manifest once all shards are there; None while some are missing.

    Hosts may do this at the same time, and a kill may come in between.

    Args:
      totals: what the manifest says of all shards, from the infos of each.
    """
    if not all(self.is_done(i) for i in range(self.shards)):
      return None
    if not self.is_finished():
      try:
        infos = [json.loads(self._info(i).read_text()) for i in range(self.shards)]
      except FileNotFoundError:  # another host was faster, and tidies up
        pass
      else:
        manifest = {**self._plan, **totals(infos), "shards": infos}
        write_json(self.folder / MANIFEST, manifest)
    for index in range(self.shards):
      self._info(index).unlink(missing_ok=True)
    return read_manifest(self.folder, self._plan["kind"])

  def _info(self, index: int) -> pathlib.Path:
    return self.folder / f"shard-{index:05d}-of-{self.shards:05d}.json"


def read_manifest(folder: pathlib.Path, kind: str) -> dict[str, Any]:
  """Reads a finished folder's manifest; every file must be there and whole."""
  path = folder / MANIFEST
  if not path.exists():
    state = "not finished" if (folder / PLAN).exists() else "not found"
    raise UserError(f"{kind} {folder}: no {MANIFEST} ({state})")
  manifest = json.loads(path.read_text())
  found = manifest.get("kind"), manifest.get("format")
  if found != (kind, FORMAT_VERSION):
    raise UserError(
      f"{path}: kind {found[0]!r}, format {found[1]!r}; expected {kind!r}, format"
      f" {FORMAT_VERSION}"
    )
  for shard in manifest["shards"]:
    for file in shard["files"].values():
      place = folder / file["file"]
      size = place.stat().st_size if place.exists() else None
      if size != file["bytes"]:
        state = "missing" if size is None else f"{size} bytes"
        raise UserError(f"{place}: {state}, expected {file['bytes']} bytes")
  return manifest


def paths(folder: pathlib.Path, manifest: Mapping[str, Any], kind: str) -> list[str]:
  """The files of one kind, in the order of the shards."""
  return [str(folder / shard["files"][kind]["file"]) for shard in manifest["shards"]]


def sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(value: Any) -> Any:
  """The value as it will be read back: tuples become lists."""
  return json.loads(json.dumps(value))


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes at once or not at all, whoever else writes the same."""
  part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
  part.write_text(json.dumps(value, indent=1))
  part.rename(path)
