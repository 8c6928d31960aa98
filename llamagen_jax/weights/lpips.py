"""LPIPS's published weights -> ours, from either way they are laid out in files.

Combined: one file with `net.slice{1..5}.{i}` and `lin{0..4}.model.1.weight`. Apart: a
file of VGG16 as torchvision publishes it (`features.{i}`), and one of the `lin`
weights, as the LPIPS package and VQGAN's ship it under the name vgg.pth.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path
from llamagen_jax.vision.lpips import GROUPS, conv_names
from llamagen_jax.weights.files import read_weights
from llamagen_jax.weights.tables import Array, Entry, conv, read_table

CLASSIFIER = "classifier."  # VGG16's own
CONSTANTS = "scaling_layer."
HELP = (
  "get `vgg.pth` of the LPIPS package (weights/v0.1) and torchvision's VGG16 weights"
  " (vgg16-397923af.pth) and name both, separated by a comma;"
  " --config.loss.perceptual_weight=0 trains without LPIPS"
)


def lpips_from_torch(state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns LPIPS's parameters, of a combined state dict or the union of two."""
  used = {}
  for name, value in state_dict.items():
    if name.startswith((CLASSIFIER, CONSTANTS)):
      continue
    used[re.sub(r"^(net\.slice\d|features)\.", "", name)] = value
  if not any(name.startswith("lin") for name in used):
    raise UserError(f"LPIPS: no weights lin0 .. lin4 are given; {HELP}")
  if not any(name[0].isdigit() for name in used):
    raise UserError(f"LPIPS: no weights of VGG16 are given; {HELP}")
  return read_table(_table(), used)


def load_lpips(files: str) -> dict[str, Any]:
  """Reads the file, or the two files with a comma between them, local or gs://."""
  if not files:
    raise UserError(f"loss.lpips is empty, but loss.perceptual_weight is not 0: {HELP}")
  state_dict = {}
  for name in files.split(","):
    path = user_path(name.strip())
    if not path.exists():
      raise UserError(f"loss.lpips: no file {path}; {HELP}")
    state_dict |= read_weights(path).tensors
  return lpips_from_torch(state_dict)


def _table() -> list[Entry]:
  table, index = [], 0
  for name, inputs, width in conv_names():
    if name.endswith("_1") and index:
      index += 1  # the maximum between two groups
    table += conv((name,), str(index), (width, inputs, 3, 3))
    index += 2  # a ReLU follows
  for i, group in enumerate(GROUPS):
    tensors = {f"lin{i}.model.1.weight": (1, group[-1], 1, 1)}
    table.append(
      Entry((f"lin{i + 1}",), tensors, np.ravel, lambda p: (p[None, :, None, None],))
    )
  return table
