"""Files and folders that a user names: local, `~/...`, or `gs://...` in a bucket."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
from typing import IO, Any
import uuid

from etils import epath

from llamagen_jax.errors import UserError

BUCKET = "gs://"


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

  Args:
    path: where the file is to be; its folder exists.
    mode: "wb" for bytes, "w" for UTF-8 text.
    shared: several processes may write the same file at the same time.
  """
  path = epath.Path(path)
  tag = f".{uuid.uuid4().hex}" if shared else ""
  part = path.with_name(f".{path.name}{tag}.part")
  try:
    with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
      yield file
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


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
  text = epath.Path(path).read_bytes()
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
