"""Files and folders that a user names: local, `~/...`, or `gs://...` in a bucket."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import hashlib
import json
import logging as python_logging
import os
import pathlib
import random
import re
import shutil
import tempfile
import time
from typing import IO, Any, TypeVar
import uuid

from absl import logging
from etils import epath
import fsspec

from llamagen_jax.errors import RunFailed, StorageDown, UserError, first_line

BUCKET = "gs://"
RETRY_SECONDS = 600  # that a bucket may be out of order
# Status codes in errors of TensorStore and ArrayRecord, of storage that is down.
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED: HTTP")
T = TypeVar("T")

# gcsfs 2026.10 remembers listings for ever, so a host would not see the files that
# another one writes; and it logs a traceback for every error that it raises.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)


def user_path(path: str | os.PathLike) -> epath.Path:
  """Returns the path that a user means, with `~` expanded.

  Raises:
    UserError: another scheme than gs://, or a bucket without the package that reads it.
  """
  text = os.fspath(path)
  scheme, separator, _ = text.partition("://")
  if separator and f"{scheme}://" != BUCKET:
    raise UserError(
      f"{text}: expected a local path or gs://BUCKET/..., found {scheme}:"
    )
  if text.startswith(BUCKET):
    try:
      import gcsfs  # noqa: F401
    except ImportError as error:
      raise UserError(
        f"{text}: buckets need gcsfs: pip install 'llamagen_jax[gcs]'"
      ) from error
    return epath.Path(text)
  return epath.Path(text).expanduser()


def in_bucket(path: str | os.PathLike) -> bool:
  """Returns whether a path lies in a bucket."""
  return os.fspath(path).startswith(BUCKET)


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
  """Returns a path on this machine's disk, with `~` expanded.

  Raises:
    UserError: `name`, the flag or config field, cannot serve a bucket.
  """
  if "://" in os.fspath(path):
    raise UserError(f"{name}={path}: expected a local path, found a bucket")
  return pathlib.Path(path).expanduser()


@contextlib.contextmanager
def atomic_write(
  path: str | os.PathLike, mode: str = "wb", *, shared: bool = False
) -> Iterator[IO[Any]]:
  """Opens a file that appears under its name only when it is complete.

  A file for a bucket is collected on the local disk and uploaded at the end.

  Args:
    path: where the file is to be; its folder exists.
    mode: "wb" for bytes, "w" for UTF-8 text.
    shared: several processes may write the same file at the same time.
  """
  path = epath.Path(path)
  encoding = None if "b" in mode else "utf-8"
  if in_bucket(path):
    with tempfile.TemporaryDirectory() as folder:
      local = pathlib.Path(folder, "file")
      with local.open(mode, encoding=encoding) as file:
        yield file
      upload(local, path)
    return
  tag = f".{uuid.uuid4().hex}" if shared else ""
  part = pathlib.Path(path.with_name(f".{path.name}{tag}.part"))
  try:
    with part.open(mode, encoding=encoding) as file:
      yield file
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path, where nothing is yet, that becomes `folder` when the block ends.

  What a killed process left under that name is removed first. Local disks only.
  """
  part = folder.with_name(f".{folder.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  yield part
  part.rename(folder)


def upload(local: str | os.PathLike, path: epath.Path) -> None:
  """Copies a local file into a bucket, where it appears whole or not at all."""
  retry(lambda: _filesystem().put_file(os.fspath(local), os.fspath(path)))


def sizes(folder: epath.Path) -> dict[str, int]:
  """Returns name -> bytes of the files in a folder, of a bucket by one listing.

  A bucket has no folders: one without files is not there, and has none.
  """
  if not in_bucket(folder):
    with os.scandir(folder) as entries:
      return {e.name: e.stat().st_size for e in entries if e.is_file()}
  try:
    found = retry(lambda: _filesystem().ls(os.fspath(folder), detail=True))
  except FileNotFoundError:
    return {}
  return {
    os.path.basename(entry["name"]): entry["size"]
    for entry in found
    if entry["type"] == "file"
  }


def sha256(path: epath.Path) -> str:
  """Returns the checksum of a file's bytes, in hexadecimal."""

  def read() -> str:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  return retry(read)


def cache_folder() -> pathlib.Path:
  """Returns the folder for files that can be made again; LLAMAGEN_CACHE moves it."""
  named = os.environ.get("LLAMAGEN_CACHE", "~/.cache/llamagen_jax")
  return pathlib.Path(named).expanduser()


def retry(operation: Callable[[], T]) -> T:
  """Does what reads or writes a bucket, again while the storage is out of order.

  gcsfs itself tries six times, for about half a minute; an outage may take longer.

  Raises:
    StorageDown: the storage was out of order for RETRY_SECONDS.
  """
  deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
  while True:
    try:
      return operation()
    except Exception as error:
      if not is_transient(error) or isinstance(error, StorageDown):
        raise
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      if time.monotonic() + pause > deadline:
        raise StorageDown(f"no storage for {RETRY_SECONDS} s: {reason}") from error
      logging.warning("storage: %s; again in %.0f s", reason, pause)
      time.sleep(pause * random.uniform(0.8, 1.2))
      pause = min(2 * pause, 60)


def is_transient(error: BaseException) -> bool:
  """Returns whether a storage's error passes by itself: HTTP 5xx, a cut connection."""
  if isinstance(error, (ConnectionError, TimeoutError, StorageDown)):
    return True
  if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
    return True
  # The text of an OSError has the name of a file, which may be any word.
  if not isinstance(error, OSError) and any(s in str(error) for s in TRANSIENT):
    return True
  try:
    from gcsfs.retry import is_retriable
  except ImportError:
    return False
  return is_retriable(error)


def fail_if_down(path: str | os.PathLike, error: BaseException) -> None:
  """Raises RunFailed where an error says nothing of what was to be read."""
  if is_transient(error):
    raise RunFailed(f"{path}: storage is down ({first_line(error)})") from error


@contextlib.contextmanager
def failing_if_down(path: str | os.PathLike) -> Iterator[None]:
  """Ends as `fail_if_down` says where the body raises an error of storage."""
  try:
    yield
  except Exception as error:
    fail_if_down(path, error)
    raise


def _filesystem():
  return fsspec.filesystem("gcs")


def write_text(path: str | os.PathLike, text: str, *, shared: bool = False) -> None:
  """Writes a text file, whole or not at all."""
  with atomic_write(path, "w", shared=shared) as file:
    file.write(text)


def write_json(path: str | os.PathLike, value: Any, *, shared: bool = False) -> None:
  """Writes JSON, indented by one, whole or not at all."""
  write_text(path, json.dumps(value, indent=1), shared=shared)


def read_json(path: str | os.PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: the file is not JSON in UTF-8.
    FileNotFoundError: there is no such file.
  """
  path = epath.Path(path)
  text = retry(path.read_bytes) if in_bucket(path) else path.read_bytes()
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # ValueError: UTF-8's errors, too
    raise UserError(f"{path}: not JSON ({error})") from error


def read_text(path: str | os.PathLike) -> str:
  """Reads a text file in UTF-8, with or without a byte-order mark.

  Raises:
    UserError: another encoding; names the file and the first wrong byte.
    FileNotFoundError: there is no such file.
  """
  return decode_text(epath.Path(path).read_bytes(), os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
  """Decodes UTF-8, with or without a byte-order mark; `name` stands in the error."""
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    at = error.start + len(data) - len(error.object)  # which begins after the mark
    utf16 = ", found UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    raise UserError(
      f"{name}: byte {at} is 0x{data[at]:02x}, expected text in UTF-8{utf16}"
    ) from error
  if "\0" in text:
    at = data.index(b"\0")
    raise UserError(f"{name}: byte {at} is 0x00, expected text in UTF-8")
  return text


def text_lines(text: str) -> list[str]:
  """Splits a text at \\n, \\r\\n and \\r; at no other character, as splitlines does."""
  return re.split("\r\n|\n|\r", text)
