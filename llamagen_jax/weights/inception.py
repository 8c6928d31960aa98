"""Inception's weights, `pt_inception-2015-12-05-6726825d.pth` -> ours."""

from collections.abc import Mapping
import os
from typing import Any

import flax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path
from llamagen_jax.vision.inception import CLASSES, FEATURES, abstract_inception
from llamagen_jax.weights import bundle
from llamagen_jax.weights.files import read_weights
from llamagen_jax.weights.tables import Array, Entry, conv, copy, read_table

KIND = "inception"  # of a bundle
SIGN = "Mixed_7c.branch_pool.bn.running_var"  # a tensor that no other model has
HEAD_BIAS = "fc.bias"  # ADM's logits have none
BATCHNORM = {
  "scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var",
}  # fmt: skip


def inception_from_torch(state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns Inception's parameters, float32; strict about names and shapes."""
  used = {name: value for name, value in state_dict.items() if name != HEAD_BIAS}
  return read_table(_table(), used)


def load_inception(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a bundle, the published file or a `.safetensors` of its names, as numpy."""
  if (user_path(path) / bundle.CONFIG).exists():
    return bundle.load_judge(path, KIND, lambda fields: abstract_inception())[1]
  weights = read_weights(path).tensors
  if SIGN not in weights:
    raise UserError(
      f"{path}: no tensor {SIGN}; expected pt_inception-2015-12-05-6726825d.pth"
    )
  return inception_from_torch(weights)


def _table() -> list[Entry]:
  head = {"fc.weight": (CLASSES, FEATURES)}
  table = [Entry(("head",), head, np.transpose, lambda p: (p.T,))]
  for path, leaf in flax.traverse_util.flatten_dict(abstract_inception()).items():
    *layer, kind = path
    name = ".".join(layer)
    if kind == "kernel":
      shape = tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
      table += conv(tuple(layer), f"{name}.conv", shape, bias=False)
    elif kind in BATCHNORM:
      table.append(copy(path, f"{name}.bn.{BATCHNORM[kind]}", leaf.shape))
  return table
