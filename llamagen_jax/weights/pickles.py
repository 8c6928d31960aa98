"""PyTorch's pickles, read tensor by tensor and without running their code.

A pickle is a program. It is only ever given to `torch.load(weights_only=True)`,
which builds tensors and plain containers and calls nothing else.
"""

import argparse
import atexit
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import pathlib
import pickle
import re
import shutil
import tempfile
from typing import Any
import zipfile

import numpy as np

from llamagen_jax import storage
from llamagen_jax.errors import UserError

# Entries of a checkpoint that hold weights, in the order of preference.
KEYS = ("ema", "model", "module", "state_dict")
# Libraries whose objects lie beside the weights: callbacks, configs. They are read as
# empty objects, so that none of their code runs.
BESIDE = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
# A mapped file's pages stay in memory once they were read, until the mapping is
# closed: the file is opened again after as many bytes.
WINDOW = 64 * 2**20
EXTRA = "llamagen_jax"  # entry, or metadata, that holds the settings of our export
# First bytes of what people download in the place of weights, in lower case.
FOREIGN = (
  (b"version https://git-lfs", "a pointer of Git LFS, not the file it stands for: run"
   " `git lfs pull`, or download the file itself"),
  (b"<!doctype", "a web page: the download needs another link, or a login"),
  (b"<html", "a web page: the download needs another link, or a login"),
  (b"<?xml", "an XML document, such as the error message of a server"),
  (b"gguf", "a GGUF file"),
  (b"\x89hdf", "an HDF5 file"),
  (b"\x1f\x8b", "a gzip archive: unpack it first"),
  (b"\x93numpy", "an array of numpy"),
  (b"{", "JSON text"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file; `np.asarray` reads it."""

  shape: tuple[int, ...]
  dtype: str  # name of a numpy dtype, "bfloat16"; tables.FLOATS are accepted
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    value = self.read()
    return value if dtype is None else value.astype(dtype, copy=False)


class _Inert:
  """Stands for an object of one of the libraries `BESIDE` the weights."""

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass


class TorchFile:
  """A pickle of PyTorch, mapped into memory."""

  def __init__(self, path, key: str | None, head: bytes):
    self._path, self.key, self._read_bytes = path, key, 0
    self._file = local_copy(path)
    self._mapped = zipfile.is_zipfile(self._file)  # before PyTorch 1.6 they are not
    self._refuse_other_kinds(head)
    self._inert: list[tuple[type, str]] = []
    self._state_dict = self._open()

  def tensors(self) -> dict[str, Stored]:
    return {
      name: Stored(
        tuple(value.shape),
        str(value.dtype).removeprefix("torch."),
        functools.partial(self._read, name),
      )
      for name, value in self._state_dict.items()
    }

  def _refuse_other_kinds(self, head: bytes) -> None:
    kind = foreign_kind(head)
    if self._mapped:
      with zipfile.ZipFile(self._file) as archive:
        names = {pathlib.PurePath(name).name for name in archive.namelist()}
      if "constants.pkl" in names:
        kind = "a TorchScript program: save its state_dict()"
      elif "data.pkl" not in names:
        some = ", ".join(sorted(names)[:3])
        kind = f"a zip archive of other files ({some}, ..)"
    if kind:
      raise UserError(f"{self._path}: no PyTorch checkpoint, but {kind}")

  def _read(self, name: str) -> np.ndarray:
    if self._mapped and self._read_bytes > WINDOW:
      self._state_dict, self._read_bytes = {}, 0  # closes the mapping
      self._state_dict = self._open()
    value = self._state_dict[name]
    if isinstance(value, np.ndarray):
      return value
    tensor = value.detach()
    self._read_bytes += tensor.nbytes
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

  def _open(self) -> dict[str, Any]:
    torch = import_torch()
    while True:
      allowed = torch.serialization.safe_globals([*_plain_globals(), *self._inert])
      try:
        with allowed:
          found = torch.load(
            self._file, map_location="cpu", mmap=self._mapped, weights_only=True
          )
        break
      except pickle.UnpicklingError as error:
        self._allow_or_refuse(error)
      except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
          f"{self._path}: no PyTorch checkpoint, or not a whole one: {one_line(error)}"
        ) from error
    if not isinstance(found, Mapping):
      raise UserError(f"{self._path}: holds a {type(found).__name__}, expected a dict")
    self.extra = found.get(EXTRA)
    self.key, entry = _choose(self._path, torch, found, self.key)
    return _tensors_of(torch, entry)

  def _allow_or_refuse(self, error: Exception) -> None:
    """Lets an object beside the weights be read as an empty one, or raises."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked is None:
      raise UserError(
        f"{self._path}: no PyTorch checkpoint: {_unpickler_words(error)}"
      ) from error
    name = asked[1]
    if not name.startswith(BESIDE) or name in (known for _, known in self._inert):
      raise UserError(
        f"{self._path}: refused, the pickle asks for {name}; expected nothing but"
        " tensors, numbers, plain containers and an argparse.Namespace"
      ) from error
    self._inert.append((_Inert, name))


@functools.cache
def _plain_globals() -> list:
  """Numbers and arrays of numpy, by the names of its versions 1 and 2."""
  multiarray = np._core.multiarray
  kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSUOMm"}
  return [
    argparse.Namespace, np.dtype, np.ndarray, *sorted(kinds, key=repr),
    multiarray.scalar, multiarray._reconstruct,
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
  ]  # fmt: skip


def _choose(path, torch, found: Mapping, key: str | None) -> tuple[str, Mapping]:
  """The entry that holds the weights and its name, with dots between nested ones."""
  if key:
    entry: Any = found
    for name in [key] if key in found else key.split("."):
      entry = entry.get(name) if isinstance(entry, Mapping) else None
    if isinstance(entry, Mapping) and _tensors_of(torch, entry):
      return key, entry
    raise UserError(f"{path}: no weights under {key!r}; {_contents(torch, found)}")
  names: list[str] = []
  entry = found
  while inner := next((k for k in KEYS if _holds_tensors(torch, entry.get(k))), ""):
    names, entry = [*names, inner], entry[inner]
  if not _tensors_of(torch, entry):
    raise UserError(f"{path}: no state dict; {_contents(torch, found)}")
  return ".".join(names), entry


def _tensors_of(torch, entry: Mapping) -> dict[str, Any]:
  kinds = (torch.Tensor, np.ndarray)
  return {str(name): x for name, x in entry.items() if isinstance(x, kinds)}


def _holds_tensors(torch, value: Any) -> bool:
  """Whether a mapping has tensors, or an entry of `KEYS` that has."""
  return isinstance(value, Mapping) and (
    bool(_tensors_of(torch, value))
    or any(_holds_tensors(torch, value.get(key)) for key in KEYS)
  )


def _contents(torch, found: Mapping) -> str:
  """The entries of a checkpoint, and the ones that --key can name."""
  if not found:
    return "it is empty"
  entries = list(_entries_with_tensors(torch, found, ()))
  if entries:
    listed = ", ".join(f"{name} ({count})" for name, count in entries[:8])
    return f"entries that hold tensors: {listed}; --key takes one of them"
  return f"its entries are {', '.join(map(str, found))}, and none holds tensors"


def _entries_with_tensors(torch, found, names) -> Iterator[tuple[str, int]]:
  for name, value in found.items():
    if isinstance(value, Mapping) and len(names) < 4:
      path = (*names, str(name))
      if tensors := _tensors_of(torch, value):
        yield ".".join(path), len(tensors)
      yield from _entries_with_tensors(torch, value, path)


@functools.cache
def local_copy(path) -> pathlib.Path:
  """Returns a file on this machine, copied from a bucket until the process ends."""
  if not storage.in_bucket(path):
    return pathlib.Path(path)
  folder = tempfile.mkdtemp(prefix="llamagen_weights_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  copy = pathlib.Path(folder) / path.name
  with path.open("rb") as source, copy.open("wb") as target:
    shutil.copyfileobj(source, target, WINDOW)
  return copy


def foreign_kind(head: bytes) -> str:
  """The kind of file that begins so, in words, or nothing."""
  start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
  kinds = (words for magic, words in FOREIGN if start.startswith(magic))
  return next(kinds, "" if head else "an empty file")


def import_torch():
  try:
    import torch
  except ImportError as error:
    raise UserError(
      "PyTorch pickles need PyTorch: pip install 'llamagen_jax[convert]', or use a"
      " .safetensors file"
    ) from error
  return torch


def _unpickler_words(error: Exception) -> str:
  """What the unpickler says, without PyTorch's advice to load the file unsafely."""
  _, found, words = str(error).partition("WeightsUnpickler error:")
  return one_line(words.partition("Check the doc")[0]) if found else "not a pickle"


def one_line(error: Exception | str) -> str:
  """The message, again without PyTorch's advice, in one line."""
  return " ".join(str(error).partition("In PyTorch 2.6")[0].split())[:300]
