"""Inception v3 of 2015-12-05, the network behind FID, in Flax.

Rethinking the Inception Architecture (arXiv 1512.00567), as TensorFlow shipped it with
1008 outputs: average pools that leave out the padding, a maximum instead of the last
one, and a resize without half-pixel centres. Names are those of the PyTorch file.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
BATCHNORM_EPS = 1e-3
CLASSES = 1008
FEATURES = 2048
SPATIAL_CHANNELS = 7  # of mixed_6, whose 17 x 17 x 7 values sFID compares
HIGHEST = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
  """The outputs that the metrics compare, float32."""

  pool: jax.Array  # [B, 2048]
  spatial: jax.Array  # [B, 2023], 17 x 17 x 7 flattened
  logits: jax.Array  # [B, 1008], without the bias, as in ADM's Inception Score


class Conv(nn.Module):
  """Convolution, BatchNorm with its stored statistics, ReLU."""

  width: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x_BHWC):
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    shape = (*self.kernel, x_BHWC.shape[-1], self.width)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    scale = self.param("scale", ones, shape[-1:])
    bias = self.param("bias", zeros, shape[-1:])
    mean = self.param("mean", zeros, shape[-1:])
    variance = self.param("variance", ones, shape[-1:])
    x_BHWC = jax.lax.conv_general_dilated(
      x_BHWC,
      kernel,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=HIGHEST,
    )
    gain = scale * jax.lax.rsqrt(variance + BATCHNORM_EPS)
    return nn.relu((x_BHWC - mean) * gain + bias)


class Block35(nn.Module):
  """Mixed_5b .. 5d, on 35 x 35."""

  pool_width: int

  @nn.compact
  def __call__(self, x):
    a = Conv(64, name="branch1x1")(x)
    b = Conv(48, name="branch5x5_1")(x)
    b = Conv(64, (5, 5), name="branch5x5_2")(b)
    c = Conv(64, name="branch3x3dbl_1")(x)
    c = Conv(96, (3, 3), name="branch3x3dbl_2")(c)
    c = Conv(96, (3, 3), name="branch3x3dbl_3")(c)
    d = Conv(self.pool_width, name="branch_pool")(average_pool(x))
    return jnp.concatenate([a, b, c, d], axis=-1)


class Reduce35(nn.Module):
  """Mixed_6a: 35 x 35 to 17 x 17."""

  @nn.compact
  def __call__(self, x):
    a = Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
    b = Conv(64, name="branch3x3dbl_1")(x)
    b = Conv(96, (3, 3), name="branch3x3dbl_2")(b)
    b = Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
    return jnp.concatenate([a, b, reducing_pool(x)], axis=-1)


class Block17(nn.Module):
  """Mixed_6b .. 6e, on 17 x 17; also returns its first branch."""

  width: int

  @nn.compact
  def __call__(self, x):
    w = self.width
    a = Conv(192, name="branch1x1")(x)
    b = Conv(w, name="branch7x7_1")(x)
    b = Conv(w, (1, 7), name="branch7x7_2")(b)
    b = Conv(192, (7, 1), name="branch7x7_3")(b)
    c = Conv(w, name="branch7x7dbl_1")(x)
    c = Conv(w, (7, 1), name="branch7x7dbl_2")(c)
    c = Conv(w, (1, 7), name="branch7x7dbl_3")(c)
    c = Conv(w, (7, 1), name="branch7x7dbl_4")(c)
    c = Conv(192, (1, 7), name="branch7x7dbl_5")(c)
    d = Conv(192, name="branch_pool")(average_pool(x))
    return jnp.concatenate([a, b, c, d], axis=-1), a


class Reduce17(nn.Module):
  """Mixed_7a: 17 x 17 to 8 x 8."""

  @nn.compact
  def __call__(self, x):
    a = Conv(192, name="branch3x3_1")(x)
    a = Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(a)
    b = Conv(192, name="branch7x7x3_1")(x)
    b = Conv(192, (1, 7), name="branch7x7x3_2")(b)
    b = Conv(192, (7, 1), name="branch7x7x3_3")(b)
    b = Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
    return jnp.concatenate([a, b, reducing_pool(x)], axis=-1)


class Block8(nn.Module):
  """Mixed_7b and 7c, on 8 x 8."""

  pool: str  # "average" or "max"

  @nn.compact
  def __call__(self, x):
    a = Conv(320, name="branch1x1")(x)
    b = Conv(384, name="branch3x3_1")(x)
    b = [
      Conv(384, (1, 3), name="branch3x3_2a")(b),
      Conv(384, (3, 1), name="branch3x3_2b")(b),
    ]
    c = Conv(448, name="branch3x3dbl_1")(x)
    c = Conv(384, (3, 3), name="branch3x3dbl_2")(c)
    c = [
      Conv(384, (1, 3), name="branch3x3dbl_3a")(c),
      Conv(384, (3, 1), name="branch3x3dbl_3b")(c),
    ]
    if self.pool == "max":
      d = nn.max_pool(x, (3, 3), (1, 1), "SAME")
    else:
      d = average_pool(x)
    d = Conv(192, name="branch_pool")(d)
    return jnp.concatenate([a, *b, *c, d], axis=-1)


class Inception(nn.Module):
  """Returns the `Features` of images [B, H, W, 3] in [0, 255], of any size."""

  @nn.compact
  def __call__(self, images):
    x = resize_tf1(images.astype(jnp.float32), SIDE)
    x = (x - 128) / 128
    x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = reducing_pool(x)
    x = Conv(80, name="Conv2d_3b_1x1")(x)
    x = Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
    x = reducing_pool(x)
    x = Block35(32, name="Mixed_5b")(x)
    x = Block35(64, name="Mixed_5c")(x)
    x = Block35(64, name="Mixed_5d")(x)
    x = Reduce35(name="Mixed_6a")(x)
    x, _ = Block17(128, name="Mixed_6b")(x)
    x, _ = Block17(160, name="Mixed_6c")(x)
    x, branch = Block17(160, name="Mixed_6d")(x)
    spatial = branch[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    x, _ = Block17(192, name="Mixed_6e")(x)
    x = Reduce17(name="Mixed_7a")(x)
    x = Block8("average", name="Mixed_7b")(x)
    x = Block8("max", name="Mixed_7c")(x)
    pool = jnp.mean(x, axis=(1, 2))
    shape = (FEATURES, CLASSES)
    head = self.param("head", nn.initializers.lecun_normal(), shape)
    return Features(pool, spatial, jnp.matmul(pool, head, precision=HIGHEST))


def average_pool(x_BHWC: jax.Array) -> jax.Array:
  """Returns the mean of the 3 x 3 pixels around each one that lie in the image."""
  return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)


def reducing_pool(x_BHWC: jax.Array) -> jax.Array:
  return nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID")


def resize_tf1(images: jax.Array, side: int) -> jax.Array:
  """Resizes [B, H, W, C] to [B, side, side, C], bilinear as TensorFlow 1 did it.

  Pixel i of the result lies at i * H / side of the source: no half-pixel centres, no
  antialiasing, no aligned corners.
  """
  rows, columns = (jnp.asarray(_weights(n, side)) for n in images.shape[1:3])
  return jnp.einsum("BijC,oi,pj->BopC", images, rows, columns, precision=HIGHEST)


def _weights(length: int, side: int) -> np.ndarray:
  """Returns the interpolation matrix [side, length]."""
  position = np.arange(side, dtype=np.float32) * np.float32(length / side)
  low = np.floor(position).astype(int)
  high = np.minimum(low + 1, length - 1)
  weights, row = np.zeros((side, length), np.float32), np.arange(side)
  np.add.at(weights, (row, low), 1 - (position - low))
  np.add.at(weights, (row, high), position - low)
  return weights


@jax.jit
def extract_features(params: Any, images: jax.Array) -> Features:
  """Runs the network; data-parallel where the images are sharded by their batch."""
  return Inception().apply({"params": params}, images)


def abstract_inception() -> Any:
  """Returns the shapes of the parameters."""
  image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.uint8)
  return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
