"""Folders of shards, local or in a bucket, that a kill cannot spoil.

`plan.json` says what every shard has in common. A shard is written under hidden
names, renamed, and vouched for by a small JSON file, `shard-*.json`, until
`manifest.json`, which is written last, takes over all of these. A folder without a
manifest is not finished. Several processes may write shards of their own.
"""

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
from typing import Any, Generic, TypeVar

from array_record.python import array_record_module
from etils import epath
import grain

from llamagen_jax.errors import UserError, first_line
from llamagen_jax.storage import (
  cache_folder,
  fail_if_down,
  in_bucket,
  read_json,
  sha256,
  sizes,
  upload,
  user_path,
  write_json,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
# Training reads single records at random, and neither codes nor images compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
T = TypeVar("T")
REQUESTS = 16  # small files that are read from a bucket at the same time


class ShardWriter:
  """A folder that is being written; every shard by one process at a time."""

  def __init__(self, folder: str | os.PathLike, plan: Mapping[str, Any], shards: int):
    """Begins a folder, or continues one that was begun with the same plan.

    Args:
      folder: where the shards are to be.
      plan: what they have in common; `kind` says of what they are.
      shards: how many there will be.
    """
    self.folder, self.shards = user_path(folder), shards
    self.kind = plan["kind"]
    self.folder.mkdir(parents=True, exist_ok=True)
    self._plan = as_json({"format": FORMAT_VERSION, **plan})
    self._names = set(sizes(self.folder))
    path = self.folder / PLAN
    found = read_json(path) if path.exists() else None
    if found is not None and self._discard_empty(found != self._plan):
      found = None
    if found is None:
      write_json(path, self._plan, shared=True)
      return
    for name in self._plan | found:
      if found.get(name) != self._plan.get(name):
        raise UserError(
          f"{self.folder} was begun with other settings: {name} is"
          f" {found.get(name)!r} there, {self._plan.get(name)!r} here; choose another"
          " folder"
        )

  def _discard_empty(self, changed: bool) -> bool:
    """Deletes shards without any record, so that a mistake can be corrected.

    Args:
      changed: the settings are others than those of the shards.

    Returns:
      whether the folder is as good as new. That of finished shards never is, nor one
      whose settings are the same while some of its shards are still missing.
    """
    done = fnmatch.filter(self._names, "shard-*-of-*.json")
    infos = [] if self.is_finished() else [read_json(self.folder / n) for n in done]
    if self.is_finished() or any(info.get("records", 1) for info in infos):
      return False
    if not changed and len(done) < self.shards:
      return False
    files = [file["file"] for info in infos for file in info["files"].values()]
    rejected = fnmatch.filter(self._names, "rejected-*-of-*.txt")
    for name in (*done, *files, *rejected):
      (self.folder / name).unlink(missing_ok=True)
    self._names -= {*done, *files, *rejected}
    return True

  def file_name(self, kind: str, index: int) -> str:
    return f"{kind}-{index:05d}-of-{self.shards:05d}.array_record"

  def part(self, name: str) -> pathlib.Path:
    """Returns the local path under which a file is written until its shard is whole."""
    if not in_bucket(self.folder):
      return pathlib.Path(self.folder, f".{name}.part")
    # The same name after a kill: the next process writes over what the last one left.
    digest = hashlib.sha256(os.fspath(self.folder).encode()).hexdigest()[:16]
    folder = cache_folder() / "uploads" / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name

  @contextlib.contextmanager
  def records(
    self, kind: str, index: int
  ) -> Iterator[array_record_module.ArrayRecordWriter]:
    """Opens the ArrayRecord file of one kind of a shard, to be committed later."""
    path = self.part(self.file_name(kind, index))
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
      yield writer
    finally:
      writer.close()

  def is_done(self, index: int) -> bool:
    """Returns whether a shard was whole when the folder was opened, or is since."""
    return self.is_finished() or self._info_name(index) in self._names

  def is_finished(self) -> bool:
    return MANIFEST in self._names

  def commit(self, index: int, files: Mapping[str, str], info: dict[str, Any]) -> None:
    """Publishes a shard's files {kind: name} and vouches for them with `info`."""
    described = {}
    for kind, name in files.items():
      part = self.part(name)
      size = part.stat().st_size
      described[kind] = {"file": name, "bytes": size, "sha256": sha256(part)}
      if in_bucket(self.folder):
        upload(part, self.folder / name)
        part.unlink()
      else:
        part.replace(self.folder / name)
    name = self._info_name(index)
    write_json(self.folder / name, {"files": described, **info})
    self._names.add(name)

  def infos(self) -> dict[int, dict[str, Any]]:
    """Returns the infos of all shards that are done by now, of any process."""
    self._names = set(sizes(self.folder))
    if self.is_finished():
      return dict(enumerate(read_json(self.folder / MANIFEST)["shards"]))
    done = [i for i in range(self.shards) if self._info_name(i) in self._names]
    paths = [self.folder / self._info_name(i) for i in done]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
      return dict(zip(done, pool.map(read_json, paths), strict=True))

  def finish(
    self, totals: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
  ) -> dict[str, Any] | None:
    """Writes the manifest once all shards are there; None while some are missing.

    Several processes may do this at the same time, and a kill may come in between.

    Args:
      totals: makes the manifest's fields about all shards of their infos, and may
        take out of these what the manifest does not need a shard.
    """
    try:
      infos = self.infos()
    except FileNotFoundError:  # another process wrote the manifest meanwhile
      infos = self.infos()
    if len(infos) < self.shards:
      return None
    if not self.is_finished():
      infos = [infos[i] for i in range(self.shards)]
      manifest = {**self._plan, **totals(infos), "shards": infos}
      write_json(self.folder / MANIFEST, manifest, shared=True)
      self._names.add(MANIFEST)
    for index in range(self.shards):
      if self._info_name(index) in self._names:
        (self.folder / self._info_name(index)).unlink(missing_ok=True)
    return read_manifest(self.folder, self.kind)

  def _info_name(self, index: int) -> str:
    return f"shard-{index:05d}-of-{self.shards:05d}.json"


def read_manifest(folder: epath.Path, kind: str) -> dict[str, Any]:
  """Reads a finished folder's manifest; every file must be there and whole.

  Raises:
    UserError: the folder is not finished, of another kind, or damaged.
  """
  path = folder / MANIFEST
  try:
    manifest = read_json(path)
  except (FileNotFoundError, NotADirectoryError) as error:
    state = "not finished" if (folder / PLAN).exists() else "not found"
    raise UserError(f"{kind} {folder}: no {MANIFEST} ({state})") from error
  with refuse_damage(path):
    found = manifest.get("kind"), manifest.get("format")
    if found != (kind, FORMAT_VERSION):
      raise UserError(
        f"{path}: kind {found[0]!r}, format {found[1]!r}; expected {kind!r}, format"
        f" {FORMAT_VERSION}"
      )
    wanted = {file["file"]: file["bytes"] for file in _files(manifest)}
    there = sizes(folder)
    for name, size in wanted.items():
      if there.get(name) != size:
        state = f"{there[name]} bytes" if name in there else "missing"
        raise UserError(f"{folder / name}: {state}, expected {size} bytes")
  return manifest


@contextlib.contextmanager
def refuse_damage(path: epath.Path) -> Iterator[None]:
  """Turns the errors of reading a manifest whose fields are damaged into one line."""
  try:
    yield
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f"{path}: damaged ({type(error).__name__}: {first_line(error)}); copy or write"
      " the folder again"
    ) from error


def verify(folder: epath.Path, kind: str) -> int:
  """Reads every file and compares its checksum; returns how many there are.

  Raises:
    UserError: a file is not what was written.
  """
  files = _files(read_manifest(folder, kind))
  for file in files:
    found = sha256(folder / file["file"])
    if found != file["sha256"]:
      raise UserError(
        f"{folder / file['file']}: sha256 {found[:12]}.., expected"
        f" {file['sha256'][:12]}.."
      )
  return len(files)


class Records(Generic[T]):
  """Random access to the records of one kind of file, in the order of the shards.

  The manifest says how many records a shard has, so that no file is opened before
  one of its records is asked for. ArrayRecord reads buckets itself.
  """

  def __init__(
    self,
    folder: epath.Path,
    manifest: Mapping[str, Any],
    kind: str,
    unpack: Callable[[bytes], T],
  ):
    """Opens the files of a kind; `unpack` makes a record of its bytes."""
    self._folder, self._kind, self._unpack = folder, kind, unpack
    with refuse_damage(folder / MANIFEST):
      files = [
        _WholeFile(
          str(folder / shard["files"][kind]["file"]), shard["records"], shard["records"]
        )
        for shard in manifest["shards"]
      ]
      self._source = grain.sources.ArrayRecordDataSource(files)
      self._length = len(self._source)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> T:
    if not 0 <= index < self._length:
      raise IndexError(index)
    try:
      return self._unpack(self._source[index])
    except Exception as error:  # of ArrayRecord's library, or of the record
      fail_if_down(self._folder, error)
      raise UserError(
        f"{self._folder}: {self._kind} record {index} is damaged"
        f" ({first_line(error)}); copy or write the folder again"
      ) from error


def identity(manifest: Mapping[str, Any], kind: str) -> str:
  """Returns a checksum of all files of one kind, in their order."""
  digest = hashlib.sha256()
  for shard in manifest["shards"]:
    digest.update(bytes.fromhex(shard["files"][kind]["sha256"]))
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _WholeFile:
  """A file whose number of records is known; see array_record's FileInstruction."""

  filename: str
  take: int
  examples_in_shard: int
  skip: int = 0


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [file for shard in manifest["shards"] for file in shard["files"].values()]


def as_json(value: Any) -> Any:
  """Returns the value as it will be read back: tuples become lists."""
  return json.loads(json.dumps(value))
