"""torchvision's ResNet50 -> ours, by a table of names."""

from collections.abc import Mapping
import re
from typing import Any

from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path
from llamagen_jax.vision.resnet import CLASSES, convolutions
from llamagen_jax.weights.files import read_weights
from llamagen_jax.weights.tables import Array, Entry, copy, kernel, linear, read_table

HELP = (
  "get torchvision's ResNet50, first version of the weights (resnet50-0676ba61.pth);"
  " --config.loss.perceptual_weight=0 trains without it"
)
NORM = {
  "scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var",
}  # fmt: skip


def resnet_from_torch(state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns the parameters of `vision.resnet`, float32.

  Raises:
    UserError: with every missing, unexpected or misshapen tensor.
  """
  return read_table(_table(), state_dict)


def load_resnet(file: str) -> dict[str, Any]:
  """Reads the file, local or gs://."""
  if not file:
    raise UserError(f"loss.resnet is empty, but loss.perceptual=resnet50: {HELP}")
  path = user_path(file)
  if not path.exists():
    raise UserError(f"loss.resnet: no file {path}; {HELP}")
  return resnet_from_torch(read_weights(path).tensors)


def _table() -> list[Entry]:
  table = []
  for name, size, inputs, width in convolutions():
    conv = re.sub(r"^layer(\d)_(\d)_", r"layer\1.\2.", name)
    norm = conv.replace("conv", "bn")
    if conv.endswith("downsample"):
      conv, norm = f"{conv}.0", f"{conv}.1"
    shape = (size, size, inputs, width)
    table.append(kernel((name, "kernel"), f"{conv}.weight", shape))
    for ours, theirs in NORM.items():
      table.append(copy((name, ours), f"{norm}.{theirs}", (width,)))
  fc = linear(("fc", "kernel"), "fc.weight", (CLASSES, width), transpose=True)
  return [*table, fc, copy(("fc", "bias"), "fc.bias", (CLASSES,))]
