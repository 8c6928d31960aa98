"""LPIPS: a perceptual distance in the features of VGG16 (arXiv 1801.03924).

The parameters are a plain tree, read from published weights by `weights.lpips`:
`conv{i}_{j}` with kernel [3, 3, in, out] and bias, `lin{i}` with [C] weights.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Widths of VGG16's convolutions; a feature map is taken after every group, and a
# 2x2 maximum lies between the groups.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
NORM_EPS = 1e-10  # added to the norm


def conv_names() -> Iterator[tuple[str, int, int]]:
  """Yields name, input and output channels of the convolutions, in order."""
  channels = 3
  for i, group in enumerate(GROUPS, start=1):
    for j, width in enumerate(group, start=1):
      yield f"conv{i}_{j}", channels, width
      channels = width


def shapes() -> dict[str, Any]:
  """Returns the shapes of the parameters, float32."""

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  convs = {
    name: {"kernel": array(3, 3, inputs, width), "bias": array(width)}
    for name, inputs, width in conv_names()
  }
  return convs | {f"lin{i}": array(g[-1]) for i, g in enumerate(GROUPS, start=1)}


def lpips(params: Any, x_BHWC: jax.Array, y_BHWC: jax.Array, dtype: str) -> jax.Array:
  """Returns the distance of two batches of images in [-1, 1], float32 [B].

  The convolutions run in `dtype`; normalising and comparing in float32.
  """
  distance_B = jnp.zeros(len(x_BHWC))
  features = (_features(params, images, dtype) for images in (x_BHWC, y_BHWC))
  for i, (f, g) in enumerate(zip(*features, strict=True), start=1):
    error = (_unit(f) - _unit(g)) ** 2
    distance_B += jnp.mean(error @ params[f"lin{i}"], axis=(1, 2))
  return distance_B


def _features(params: Any, images: jax.Array, dtype: str) -> Iterator[jax.Array]:
  x = ((images - SHIFT) / SCALE).astype(dtype)
  for i, group in enumerate(GROUPS, start=1):
    if i > 1:
      B, H, W, C = x.shape
      x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
      x = jnp.max(x, axis=(2, 4))
    for j in range(1, len(group) + 1):
      conv = params[f"conv{i}_{j}"]
      x = jax.lax.conv_general_dilated(
        x,
        conv["kernel"].astype(dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
      x = jax.nn.relu(x + conv["bias"].astype(dtype))
    yield x.astype(jnp.float32)


def _unit(x_BHWC: jax.Array) -> jax.Array:
  """Scales to unit length over channels; where all are 0 the gradient is 0, not NaN."""
  squared = jnp.sum(x_BHWC**2, axis=-1, keepdims=True)
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return x_BHWC / (jnp.where(squared > 0, norm, 0.0) + NORM_EPS)
