"""Weight files of other systems, read tensor by tensor: PyTorch pickles, safetensors.

A pickle is a program. It is only ever given to `torch.load(weights_only=True)`,
which builds tensors and plain containers and calls nothing else.
"""

import argparse
from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import pickle
import re
import zipfile

import numpy as np

from llamagen_jax.errors import UserError

# Entries of a checkpoint that hold weights, in the order of preference.
KEYS = ("ema", "model", "module", "state_dict")
# Pages of a mapped file stay in memory once they were read, until the mapping is
# closed: it is opened anew after as many bytes.
WINDOW = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file; `np.asarray` reads it."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    value = self.read()
    return value if dtype is None else value.astype(dtype, copy=False)


def read_weights(
  path: str | pathlib.Path, key: str | None = None
) -> tuple[dict[str, Stored], str]:
  """Opens a file of weights without reading them.

  Args:
    path: `.safetensors`, or else a PyTorch pickle: a state dict or a dict of one
      with whatever else a trainer saves next to it.
    key: entry that holds the weights; by default the first of `KEYS` there is.

  Returns:
    Tensors by name, and the name of the entry they are from ("" = the file itself).

  Raises:
    UserError: for a file that is no such thing, or that would run code.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  if path.suffix == ".safetensors":
    return _read_safetensors(path), ""
  file = _TorchFile(path, key)
  return file.tensors(), file.key


def write_weights(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray]):
  """Writes `.safetensors`, or else a pickle that holds the weights under "model"."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.part")
  if path.suffix == ".safetensors":
    _safetensors().numpy.save_file(dict(state_dict), part)
  else:
    torch = _torch()
    tensors = {
      name: torch.from_numpy(np.require(value, requirements=("C", "W")))
      for name, value in state_dict.items()
    }
    torch.save({"model": tensors}, part)
  part.rename(path)


class _TorchFile:
  """A pickle of PyTorch, mapped into memory."""

  def __init__(self, path: pathlib.Path, key: str | None):
    self._path, self.key, self._read_bytes = path, key, 0
    self._mapped = zipfile.is_zipfile(path)  # before PyTorch 1.6 they are not
    self._state_dict = self._open()

  def tensors(self) -> dict[str, Stored]:
    return {
      name: Stored(tuple(tensor.shape), functools.partial(self._read, name))
      for name, tensor in self._state_dict.items()
    }

  def _read(self, name: str) -> np.ndarray:
    if self._mapped and self._read_bytes > WINDOW:
      self._state_dict, self._read_bytes = {}, 0  # closes the mapping
      self._state_dict = self._open()
    tensor = self._state_dict[name].detach()
    self._read_bytes += tensor.nbytes
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

  def _open(self):
    torch = _torch()
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
      with allowed:
        found = torch.load(
          self._path, map_location="cpu", mmap=self._mapped, weights_only=True
        )
    except pickle.UnpicklingError as error:
      raise UserError(_refusal(self._path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
      raise UserError(
        f"{self._path}: no PyTorch checkpoint: {_one_line(error)}"
      ) from error
    return self._weights(torch, found)

  def _weights(self, torch, found):
    if not isinstance(found, Mapping):
      raise UserError(f"{self._path}: holds a {type(found).__name__}, expected a dict")
    if self.key is None:
      there = (key for key in KEYS if isinstance(found.get(key), Mapping))
      self.key = next(there, "")
    if self.key:
      if not isinstance(found.get(self.key), Mapping):
        raise UserError(
          f"{self._path}: no weights under {self.key!r}; its entries are"
          f" {', '.join(map(str, found))}"
        )
      found = found[self.key]
    other = [n for n, value in found.items() if not isinstance(value, torch.Tensor)]
    if other or not found:
      what = f"{other[0]!r} is no tensor" if other else "it is empty"
      raise UserError(
        f"{self._path}: no state dict, {what}; expected one at the top or under"
        f" {', '.join(KEYS)}"
      )
    return found


def _refusal(path: pathlib.Path, error: Exception) -> str:
  if asked := re.search(r"GLOBAL (\S+)", str(error)):
    return (
      f"{path}: refused, the pickle asks for {asked[1]}; expected nothing but tensors,"
      " plain containers and an argparse.Namespace"
    )
  return f"{path}: no PyTorch checkpoint: {_one_line(error)}"


def _read_safetensors(path: pathlib.Path) -> dict[str, Stored]:
  safetensors = _safetensors()

  def read(name: str) -> np.ndarray:
    with safetensors.safe_open(path, framework="numpy") as file:
      return file.get_tensor(name)

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise UserError(f"{path}: no safetensors file: {_one_line(error)}") from error
  return {
    name: Stored(shape, functools.partial(read, name)) for name, shape in shapes.items()
  }


def _torch():
  try:
    import torch
  except ImportError as error:
    raise UserError(
      "PyTorch pickles need PyTorch: pip install 'llamagen_jax[convert]', or use a"
      " .safetensors file"
    ) from error
  return torch


def _safetensors():
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise UserError(
      "safetensors files need their library: pip install 'llamagen_jax[convert]'"
    ) from error
  return safetensors


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
