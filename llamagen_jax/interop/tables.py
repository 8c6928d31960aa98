"""Published state dicts <-> our parameter trees, by tables.

A model's table names, for every parameter of ours, the tensors it is made of. Both
directions read the same table, and both are strict.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax
import numpy as np

from llamagen_jax.errors import UserError

# Buffers of the original that are recomputed or not used here.
IGNORED = ("codebook_used", "freqs_cis", "causal_mask", "num_batches_tracked")
MOST_PROBLEMS_SHOWN = 20

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
  expected = {name: shape for e in table for name, shape in e.tensors.items()}
  problems = [f"missing {n} {s}" for n, s in expected.items() if n not in state_dict]
  for name, value in state_dict.items():
    if name in expected and tuple(value.shape) != expected[name]:
      problems.append(f"{name} is {tuple(value.shape)}, expected {expected[name]}")
    elif name not in expected and name.rpartition(".")[2] not in IGNORED:
      problems.append(f"unexpected {name} {tuple(value.shape)}")
  if problems:
    more = len(problems) - MOST_PROBLEMS_SHOWN
    shown = problems[:MOST_PROBLEMS_SHOWN] + [f"and {more} more"] * (more > 0)
    raise UserError(
      f"state dict does not fit the model, {len(problems)} problems: "
      + "; ".join(shown)
    )

  flat = {}
  for entry in table:
    value = entry.pack(*(np.asarray(state_dict[n], np.float32) for n in entry.tensors))
    if entry.layer is None:
      flat[entry.path] = np.ascontiguousarray(value)
    else:  # filled row by row, so that a big model is held once
      if entry.path not in flat:
        flat[entry.path] = np.empty((entry.layers, *value.shape), np.float32)
      flat[entry.path][entry.layer] = value
  return flax.traverse_util.unflatten_dict(flat)


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
