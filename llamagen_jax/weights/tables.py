"""Published state dicts <-> our parameter trees, by tables.

A model's table names, for every parameter of ours, the tensors it is made of. Both
directions read the same table, and both are strict.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import flax
import jax
import numpy as np

from llamagen_jax.errors import UserError

# Buffers of the original that are recomputed or not used here.
IGNORED = ("codebook_used", "freqs_cis", "causal_mask", "num_batches_tracked")

Array = np.ndarray


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
  """All of our arrays, float32."""
  return jax.tree.map(lambda load: load(), defer_table(table, state_dict))


def defer_table(table: list[Entry], state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """A tree of functions, each of which reads and returns one of our arrays.

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
    value = entry.pack(*(np.asarray(state_dict[n], np.float32) for n in entry.tensors))
    if entry.layer is None:
      return np.ascontiguousarray(value)
    if stacked is None:  # filled row by row, so that a layer is held once
      stacked = np.empty((entry.layers, *value.shape), np.float32)
    stacked[entry.layer] = value
  return stacked


def _check(table: list[Entry], state_dict: Mapping[str, Array]) -> None:
  expected = {name: shape for e in table for name, shape in e.tensors.items()}
  problems = [f"missing {n} {s}" for n, s in expected.items() if n not in state_dict]
  for name, value in state_dict.items():
    if name in expected and tuple(value.shape) != expected[name]:
      problems.append(f"{name} is {tuple(value.shape)}, expected {expected[name]}")
    elif name not in expected and name.rpartition(".")[2] not in IGNORED:
      problems.append(f"unexpected {name} {tuple(value.shape)}")
  if problems:
    raise UserError(
      f"state dict does not fit the model, {len(problems)} problems: "
      + "; ".join(problems)
    )


def write_table(table: list[Entry], params: dict[str, Any]) -> dict[str, Array]:
  flat = flax.traverse_util.flatten_dict(params)
  state_dict = {}
  for entry in table:
    value = np.asarray(flat[entry.path])
    tensors = entry.unpack(value if entry.layer is None else value[entry.layer])
    for name, tensor in zip(entry.tensors, tensors, strict=True):
      state_dict[name] = np.ascontiguousarray(tensor)
  return state_dict


def shape_of(state_dict, name: str, rank: int) -> tuple[int, ...]:
  if name not in state_dict:
    raise UserError(f"state dict has no {name}: it is not a checkpoint of this model")
  shape = tuple(state_dict[name].shape)
  if len(shape) != rank:
    raise UserError(f"{name} is {shape}, expected {rank} axes")
  return shape


def copy(path, name, shape) -> Entry:
  return Entry(path, {name: shape}, lambda w: w, lambda p: (p,))


def linear(path, name, shape, transpose: bool) -> Entry:
  if not transpose:
    return copy(path, name, shape)
  return Entry(path, {name: shape}, lambda w: w.T, lambda p: (p.T,))


def conv(path, name, shape, bias: bool = True) -> list[Entry]:
  """A convolution: OIHW weight (of this shape) and bias <-> HWIO kernel and bias."""
  pack, unpack = lambda w: w.transpose(2, 3, 1, 0), lambda p: (p.transpose(3, 2, 0, 1),)
  entries = [Entry((*path, "kernel"), {f"{name}.weight": shape}, pack, unpack)]
  if bias:
    entries.append(copy((*path, "bias"), f"{name}.bias", shape[:1]))
  return entries
