"""ResNet50 (arXiv 1512.03385): the logits that VQGAN+'s perceptual loss compares.

The parameters are a plain tree, read from torchvision's weights by `weights.resnet`:
`conv1`, `layer{i}_{j}_conv{k}`, `layer{i}_{j}_downsample`, each with a kernel and with
the scale, bias, mean and variance of its batch norm, and `fc`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS = (3, 4, 6, 3)  # of each of the four layers
EXPANSION = 4  # of a block's channels, in its last convolution
SIDE, CLASSES = 224, 1000
NORM_EPS = 1e-5
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def convolutions() -> Iterator[tuple[str, int, int, int]]:
  """Yields name, size, input and output channels of the convolutions."""
  yield "conv1", 7, 3, 64
  channels = 64
  for i, blocks in enumerate(BLOCKS, start=1):
    width = 64 * 2 ** (i - 1)
    for j in range(blocks):
      name = f"layer{i}_{j}"
      yield f"{name}_conv1", 1, channels, width
      yield f"{name}_conv2", 3, width, width
      yield f"{name}_conv3", 1, width, EXPANSION * width
      if j == 0:
        yield f"{name}_downsample", 1, channels, EXPANSION * width
      channels = EXPANSION * width


def shapes() -> dict[str, Any]:
  """Returns the shapes of the parameters, float32."""

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  tree = {
    name: {"kernel": array(size, size, inputs, width)}
    | {part: array(width) for part in ("scale", "bias", "mean", "variance")}
    for name, size, inputs, width in convolutions()
  }
  width = EXPANSION * 64 * 2 ** (len(BLOCKS) - 1)
  return tree | {"fc": {"kernel": array(width, CLASSES), "bias": array(CLASSES)}}


def logits_distance(
  params: Any, x_BHWC: jax.Array, y_BHWC: jax.Array, dtype: str
) -> jax.Array:
  """Returns the mean squared difference of the logits of images in [-1, 1], [B].

  VQGAN+ (arXiv 2409.16211), section 3.1.
  """
  difference = logits(params, x_BHWC, dtype) - logits(params, y_BHWC, dtype)
  return jnp.mean(difference**2, axis=1)


def logits(params: Any, x_BHWC: jax.Array, dtype: str) -> jax.Array:
  """Returns the logits of images in [-1, 1], resized to 224x224, float32 [B, 1000]."""
  B, _, _, C = x_BHWC.shape
  x = jax.image.resize((x_BHWC + 1) / 2, (B, SIDE, SIDE, C), "linear", antialias=True)
  x = ((x - MEAN) / STD).astype(dtype)
  x = jax.nn.relu(_convolve(params["conv1"], x, 2))
  x = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )  # fmt: skip
  for i, blocks in enumerate(BLOCKS, start=1):
    for j in range(blocks):
      x = _bottleneck(params, f"layer{i}_{j}", x, 2 if i > 1 and j == 0 else 1)
  x_BC = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
  return x_BC @ params["fc"]["kernel"] + params["fc"]["bias"]


def _bottleneck(params: Any, name: str, x: jax.Array, stride: int) -> jax.Array:
  """Narrow, 3x3 (which strides, as torchvision's does), wide; added to the input."""
  h = jax.nn.relu(_convolve(params[f"{name}_conv1"], x))
  h = jax.nn.relu(_convolve(params[f"{name}_conv2"], h, stride))
  h = _convolve(params[f"{name}_conv3"], h)
  if f"{name}_downsample" in params:
    x = _convolve(params[f"{name}_downsample"], x, stride)
  return jax.nn.relu(x + h)


def _convolve(conv: Any, x: jax.Array, stride: int = 1) -> jax.Array:
  """Convolution and batch norm by its stored statistics."""
  scale = conv["scale"] * jax.lax.rsqrt(conv["variance"] + NORM_EPS)
  kernel = (conv["kernel"] * scale).astype(x.dtype)
  pad = len(kernel) // 2
  y = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  return y + (conv["bias"] - conv["mean"] * scale).astype(x.dtype)
