"""Published state dicts <-> our parameter trees, by tables.

A model's table names, for every parameter of ours, the tensors it is made of. Both
directions read the same table, and both are strict.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

import flax
import jax
import numpy as np

from llamagen_jax.errors import UserError

# Buffers of the original that are recomputed or not used here.
IGNORED = ("codebook_used", "freqs_cis", "causal_mask", "num_batches_tracked")
# Kinds of numbers that are weights as they are; fp8 and int8 need scales beside them.
FLOATS = ("float32", "float16", "bfloat16", "float64")

Array = np.ndarray
Names = tuple[tuple[str, str], ...]  # patterns and what replaces them, in order


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of ours and the torch tensors it holds."""

  path: tuple[str, ...]  # in our tree
  tensors: dict[str, tuple[int, ...]]  # torch name -> shape
  pack: Callable[..., Array]  # torch tensors -> our array
  unpack: Callable[[Array], tuple[Array, ...]]  # our array -> torch tensors
  layer: int | None = None  # row of a stacked array
  layers: int = 0  # rows of it


def read_table(table: list[Entry], state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns all of our arrays, float32."""
  return jax.tree.map(lambda load: load(), defer_table(table, state_dict))


def defer_table(table: list[Entry], state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns a tree of functions that each read and return one of our arrays.

  Raises:
    UserError: with every missing, unexpected or misshapen tensor; nothing was read.
  """
  _check(table, state_dict)
  rows: dict[tuple[str, ...], list[Entry]] = {}
  for entry in table:
    rows.setdefault(entry.path, []).append(entry)
  return flax.traverse_util.unflatten_dict(
    {
      path: functools.partial(_load, entries, state_dict)
      for path, entries in rows.items()
    }
  )


def _load(entries: list[Entry], state_dict: Mapping[str, Array]) -> Array:
  stacked = None
  for entry in entries:
    value = entry.pack(*(_finite(name, state_dict[name]) for name in entry.tensors))
    if entry.layer is None:
      return np.ascontiguousarray(value)
    if stacked is None:  # filled row by row, so that a layer is held once
      stacked = np.empty((entry.layers, *value.shape), np.float32)
    stacked[entry.layer] = value
  return stacked


def _finite(name: str, tensor: Array) -> Array:
  """Returns a tensor's values, float32.

  Raises:
    UserError: for NaN and infinity, of which a model makes images of noise.
  """
  if hasattr(tensor, "detach"):  # of torch, which knows bfloat16 and gradients
    tensor = tensor.detach().cpu().float().numpy()
  value = np.asarray(tensor, np.float32)
  bad = value.size - np.count_nonzero(np.isfinite(value))
  if bad:
    raise UserError(
      f"{name} is broken: {bad} of its {value.size} values are NaN or infinite; the"
      " training that saved it has diverged, or the file is damaged"
    )
  return value


def _check(table: list[Entry], state_dict: Mapping[str, Array]) -> None:
  expected = {name: shape for e in table for name, shape in e.tensors.items()}
  problems = [f"missing {n} {s}" for n, s in expected.items() if n not in state_dict]
  for name, value in state_dict.items():
    if name in expected and tuple(value.shape) != expected[name]:
      problems.append(f"{name} is {tuple(value.shape)}, expected {expected[name]}")
    elif name in expected and str(value.dtype).removeprefix("torch.") not in FLOATS:
      problems.append(f"{name} is {value.dtype}, expected {' or '.join(FLOATS)}")
    elif name not in expected and name.rpartition(".")[2] not in IGNORED:
      problems.append(f"unexpected {name} {tuple(value.shape)}")
  if problems:
    raise UserError(
      f"state dict does not fit the model, {len(problems)} problems: "
      + "; ".join(problems)
    )


def write_table(table: list[Entry], params: dict[str, Any]) -> dict[str, Array]:
  """Returns the torch tensors by name, the inverse of `read_table`."""
  flat = flax.traverse_util.flatten_dict(params)
  state_dict = {}
  for entry in table:
    value = np.asarray(flat[entry.path])
    tensors = entry.unpack(value if entry.layer is None else value[entry.layer])
    for name, tensor in zip(entry.tensors, tensors, strict=True):
      state_dict[name] = np.ascontiguousarray(tensor)
  return state_dict


def shape_of(state_dict, name: str, rank: int) -> tuple[int, ...]:
  """Returns a tensor's shape; refuses one that is absent or has other axes."""
  if name not in state_dict:
    raise UserError(f"state dict has no {name}: it is not a checkpoint of this model")
  shape = tuple(state_dict[name].shape)
  if len(shape) != rank:
    raise UserError(f"{name} is {shape}, expected {rank} axes")
  return shape


def copy(path, name, shape) -> Entry:
  """Returns the entry of a tensor that both sides store alike."""
  return Entry(path, {name: shape}, lambda w: w, lambda p: (p,))


def linear(path, name, shape, transpose: bool) -> Entry:
  """Returns the entry of a matrix, [out, in] (its `shape`) <-> [in, out] if asked."""
  if not transpose:
    return copy(path, name, shape)
  return Entry(path, {name: shape}, lambda w: w.T, lambda p: (p.T,))


def rename(name: str, names: Names) -> str:
  """Returns a name after every pattern's replacement."""
  for pattern, replacement in names:
    name = re.sub(pattern, replacement, name)
  return name


def kernel(path, name, shape) -> Entry:
  """Returns the entry of an HWIO kernel (its `shape`) <-> an OIHW weight."""
  theirs = tuple(shape[i] for i in (3, 2, 0, 1))
  return Entry(
    path, {name: theirs}, lambda w: w.transpose(2, 3, 1, 0),
    lambda p: (p.transpose(3, 2, 0, 1),),
  )  # fmt: skip


def pointwise(path, name, shape) -> Entry:
  """Returns the entry of a 1x1 HWIO kernel (its `shape`) <-> an [out, in] matrix."""
  theirs = (shape[3], shape[2])
  return Entry(path, {name: theirs}, lambda w: w.T[None, None], lambda p: (p[0, 0].T,))


def conv(path, name, shape, bias: bool = True) -> list[Entry]:
  """Returns the entries of an OIHW weight (its `shape`) and its bias <-> ours."""
  ours = tuple(shape[i] for i in (2, 3, 1, 0))
  entries = [kernel((*path, "kernel"), f"{name}.weight", ours)]
  if bias:
    entries.append(copy((*path, "bias"), f"{name}.bias", shape[:1]))
  return entries
