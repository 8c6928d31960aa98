"""Files of finished images that have a URL: in a folder, or in memory."""

import asyncio
import base64
import collections
import pathlib
import re
import secrets
import threading
import time
from typing import NamedTuple, Protocol

from absl import logging

from llamagen_jax.errors import UserError
from llamagen_jax.storage import atomic_write

URL_PATH = "/images"
NAME = re.compile(r"[\w-]{32}\.(png|jpeg|webp)")
MEMORY_SECONDS, MEMORY_BYTES = 3600, 256 * 2**20
SWEEP_SECONDS = 600
DAY = 24 * 3600


class Store(Protocol):
  """Keeps files of images.

  Names are random and long: who knows one may see the image, nobody can guess it.
  """

  def save(self, data: bytes, kind: str, root: str) -> str:
    """Keeps a file of that format; returns its URL below the server's root."""

  def get(self, name: str) -> bytes | None:
    """Returns a file, or None if it is not there any more."""

  def sweep(self) -> None:
    """Deletes files that are too old."""


class FolderStore:
  """A folder, whose images are deleted after `days`; 0 = never."""

  def __init__(self, folder: pathlib.Path, days: float):
    self._folder, self._days = folder, days
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"--store={folder}: {error.strerror}") from error

  def save(self, data: bytes, kind: str, root: str) -> str:
    name = _new_name(kind)
    with atomic_write(self._folder / name) as file:
      file.write(data)
    return _url(root, name)

  def get(self, name: str) -> bytes | None:
    try:
      return (self._folder / name).read_bytes()
    except FileNotFoundError:
      return None

  def sweep(self) -> None:
    if not self._days:
      return
    oldest = time.time() - self._days * DAY
    for path in self._folder.iterdir():  # deletes only files that `save` has named
      if NAME.fullmatch(path.name) and path.stat().st_mtime < oldest:
        path.unlink(missing_ok=True)


class _Kept(NamedTuple):
  data: bytes
  until: float  # time.monotonic


class MemoryStore:
  """The memory of the process, for an hour or until newer images fill it."""

  def __init__(self, seconds: float = MEMORY_SECONDS, largest: int = MEMORY_BYTES):
    self._seconds, self._largest, self._bytes = seconds, largest, 0
    self._kept: collections.OrderedDict[str, _Kept] = collections.OrderedDict()
    self._lock = threading.Lock()

  def save(self, data: bytes, kind: str, root: str) -> str:
    name = _new_name(kind)
    with self._lock:
      self._kept[name] = _Kept(data, time.monotonic() + self._seconds)
      self._bytes += len(data)
      while self._bytes > self._largest and len(self._kept) > 1:
        self._drop_oldest()
    return _url(root, name)

  def get(self, name: str) -> bytes | None:
    self.sweep()
    with self._lock:
      return self._kept[name].data if name in self._kept else None

  def sweep(self) -> None:
    with self._lock:
      while self._kept and next(iter(self._kept.values())).until < time.monotonic():
        self._drop_oldest()

  def _drop_oldest(self) -> None:
    self._bytes -= len(self._kept.popitem(last=False)[1].data)


class DataURLs:
  """No files: the URL is the image itself. For replicas without a common folder."""

  def save(self, data: bytes, kind: str, root: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

  def get(self, name: str) -> bytes | None:
    return None

  def sweep(self) -> None:
    pass


def _new_name(kind: str) -> str:
  return f"{secrets.token_urlsafe(24)}.{kind}"


def _url(root: str, name: str) -> str:
  return f"{root.rstrip('/')}{URL_PATH}/{name}"


async def sweep_for_ever(store: Store) -> None:
  """Deletes old files now and then."""
  while True:
    try:
      await asyncio.to_thread(store.sweep)
    except OSError as error:
      logging.warning("--store: %s", error)
    await asyncio.sleep(SWEEP_SECONDS)
