"""Discriminators of the tokenizer's adversarial loss: PatchGAN, StyleGAN's, VQGAN+'s.

All take images [B, H, W, 3] in [-1, 1] and return float32 logits, large for real.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.tokenizer.model import group_norm

LEAK = 0.2  # of LeakyReLU
BATCH_NORM_EPS = 1e-5
STYLEGAN_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64,
                     512: 32}  # fmt: skip
STYLEGAN_HIDDEN = 512
# Of VQGAN+'s: slope of LeakyReLU, blur filter, groups, and side of the logits.
BLUR_LEAK, BLUR_TAPS, BLUR_GROUPS, BLUR_SIDE = 0.1, (1, 3, 3, 1), 32, 16
BLUR_NORM_EPS = 1e-5
KINDS = ("patchgan", "stylegan", "blurpool")
PARAMETER_KEY = 1  # folded into the run's key, which the generator starts from


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  kind: str = "patchgan"  # patchgan | stylegan | blurpool (VQGAN+)
  width: int = 64  # patchgan, blurpool: channels of the first convolution
  layers: int = 3  # patchgan, blurpool: how often the resolution is halved
  dtype: str = "float32"  # of activations: float32 | bfloat16

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(
        f"discriminator.kind={self.kind!r}: expected {' or '.join(KINDS)}"
      )
    if self.kind == "blurpool" and self.width % BLUR_GROUPS:
      raise UserError(
        f"discriminator.width={self.width}: blurpool expects a multiple of"
        f" {BLUR_GROUPS}"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"discriminator.dtype={self.dtype!r}: expected float32 or bfloat16"
      )

  def check_side(self, side: int) -> None:
    """Refuses images that the discriminator has no shape for."""
    if self.kind == "stylegan" and (side not in STYLEGAN_CHANNELS or side < 8):
      raise UserError(
        f"discriminator.kind=stylegan: images of {side}, expected a power of two"
        " from 8 to 512"
      )
    if self.kind == "patchgan" and side // 2**self.layers < 3:
      raise UserError(
        f"discriminator.layers={self.layers}: images of {side} are too small, they"
        f" need {3 * 2**self.layers}"
      )
    if self.kind == "blurpool" and side % (BLUR_SIDE * 2**self.layers):
      raise UserError(
        f"discriminator.layers={self.layers}: images of {side}, blurpool expects a"
        f" multiple of {BLUR_SIDE * 2**self.layers}"
      )


def discriminate(config: DiscriminatorConfig, params: Any, images: jax.Array):
  """Returns the logits of images: [B, h, w, 1] a patch, or [B, 1] an image."""
  return make_discriminator(config).apply({"params": params}, images)


@functools.partial(jax.jit, static_argnames=("config", "side"))
def init_discriminator(config: DiscriminatorConfig, side: int, key: jax.Array) -> Any:
  """Returns new float32 parameters for images of `side`, boxed with axis names."""
  key = jax.random.fold_in(key, PARAMETER_KEY)
  images = jnp.zeros((1, side, side, 3))
  return make_discriminator(config).init(key, images)["params"]


def make_discriminator(config: DiscriminatorConfig) -> nn.Module:
  """Returns the network of a config."""
  kinds = {"patchgan": PatchGAN, "stylegan": StyleGAN, "blurpool": BlurPool}
  return kinds[config.kind](config)


class Conv(nn.Module):
  """Square convolution with explicit padding, sharded by output channels."""

  config: DiscriminatorConfig
  features: int
  size: int
  kernel_init: nn.initializers.Initializer
  stride: int = 1
  padding: int = 1
  bias: bool = True

  @nn.compact
  def __call__(self, x_BHWC):
    partitioned = nn.with_logical_partitioning
    conv = nn.Conv(
      self.features,
      (self.size, self.size),
      self.stride,
      self.padding,
      use_bias=self.bias,
      dtype=self.config.dtype,
      kernel_init=partitioned(self.kernel_init, (None, None, None, "conv_out")),
      bias_init=partitioned(nn.initializers.zeros, ("conv_out",)),
    )
    nn.share_scope(self, conv)
    return conv(x_BHWC)


class BatchNorm(nn.Module):
  """Normalises by the statistics of the whole batch, over all chips.

  Discriminators are only ever used in training, so no running averages are kept.
  """

  @nn.compact
  def __call__(self, x_BHWC):
    channels = x_BHWC.shape[-1:]
    scale_C = self.param("scale", _normal(mean=1.0), channels)
    bias_C = self.param("bias", nn.initializers.zeros, channels)
    x = x_BHWC.astype(jnp.float32)
    mean_C = jnp.mean(x, axis=(0, 1, 2))
    variance_C = jnp.mean((x - mean_C) ** 2, axis=(0, 1, 2))
    x = (x - mean_C) * jax.lax.rsqrt(variance_C + BATCH_NORM_EPS)
    return (x * scale_C + bias_C).astype(x_BHWC.dtype)


class PatchGAN(nn.Module):
  """A logit a patch (pix2pix, arXiv 1611.07004, section 6.1.2)."""

  config: DiscriminatorConfig

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    conv = functools.partial(Conv, c, size=4, kernel_init=_normal())
    x = x_BHWC.astype(c.dtype)
    for i in range(c.layers + 1):
      features = c.width * min(2**i, 8)
      stride = 2 if i < c.layers else 1
      x = conv(features, stride=stride, bias=i == 0, name=f"conv_{i}")(x)
      if i > 0:
        x = BatchNorm(name=f"norm_{i}")(x)
      x = nn.leaky_relu(x, LEAK)
    return conv(1, name="conv_out")(x).astype(jnp.float32)


class StyleGAN(nn.Module):
  """A logit an image: StyleGAN2's residual form (arXiv 1912.04958, section 4.1)."""

  config: DiscriminatorConfig

  @nn.compact
  def __call__(self, x_BHWC):
    c, side = self.config, x_BHWC.shape[1]
    x = x_BHWC.astype(c.dtype)
    x = nn.leaky_relu(_conv3(c, STYLEGAN_CHANNELS[side], x, "conv_in"), LEAK)
    while side > 4:
      side //= 2
      x = StyleGANBlock(c, STYLEGAN_CHANNELS[side], name=f"block_{side}")(x)
    x = nn.leaky_relu(_conv3(c, x.shape[-1], x, "conv_out"), LEAK)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channel-major, as published
    x = nn.leaky_relu(_dense(c, STYLEGAN_HIDDEN, x, "hidden"), LEAK)
    return _dense(c, 1, x, "logit").astype(jnp.float32)


class StyleGANBlock(nn.Module):
  """Halves the resolution."""

  config: DiscriminatorConfig
  features: int

  @nn.compact
  def __call__(self, x_BHWC):
    c, width = self.config, x_BHWC.shape[-1]
    init = _uniform(width)
    shortcut = Conv(c, self.features, 1, init, stride=2, padding=0, name="shortcut")
    kept = shortcut(x_BHWC)
    x = nn.leaky_relu(_conv3(c, self.features, x_BHWC, "conv1"), LEAK)
    x = nn.leaky_relu(_conv3(c, self.features, x, "conv2"), LEAK)
    x = _conv3(c, self.features, blur(x), "downsample", stride=2)
    return (x + kept) * 2**-0.5


class BlurPool(nn.Module):
  """A logit for each of 16x16 patches (VQGAN+, arXiv 2409.16211, section 3.1)."""

  config: DiscriminatorConfig

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config

    def conv(features, size, name):
      init = _uniform(size**2 * x.shape[-1])
      return Conv(c, features, size, init, padding=size // 2, name=name)(x)

    x = x_BHWC.astype(c.dtype)
    x = nn.leaky_relu(conv(c.width, 5, "conv_in"), BLUR_LEAK)
    for i in range(c.layers):
      x = blur_pool(conv(c.width * 2**i, 3, f"conv_{i}"))
      x = nn.leaky_relu(GroupNorm(name=f"norm_{i}")(x), BLUR_LEAK)
    size = x.shape[1] // BLUR_SIDE
    x = nn.max_pool(x, (size, size), (size, size))
    x = nn.leaky_relu(conv(x.shape[-1], 1, "hidden"), BLUR_LEAK)
    return conv(1, 5, "conv_out").astype(jnp.float32)


class GroupNorm(nn.Module):
  """Normalises groups of channels, in float32."""

  @nn.compact
  def __call__(self, x_BHWC):
    channels = x_BHWC.shape[-1:]
    scale_C = self.param("scale", nn.initializers.ones, channels)
    bias_C = self.param("bias", nn.initializers.zeros, channels)
    x = group_norm(x_BHWC, scale_C, bias_C, BLUR_GROUPS, BLUR_NORM_EPS)
    return x.astype(x_BHWC.dtype)


def blur_pool(x_BHWC: jax.Array) -> jax.Array:
  """Halves the sides after a [1, 3, 3, 1] x [1, 3, 3, 1] filter, with zeros outside."""
  channels = x_BHWC.shape[-1]
  taps = jnp.array(BLUR_TAPS, x_BHWC.dtype) / sum(BLUR_TAPS)
  kernel_441C = jnp.tile(jnp.outer(taps, taps)[:, :, None, None], (1, 1, 1, channels))
  return jax.lax.conv_general_dilated(
    x_BHWC, kernel_441C, (2, 2), "SAME", feature_group_count=channels,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


def blur(x_BHWC: jax.Array) -> jax.Array:
  """Normalised [1, 2, 1] x [1, 2, 1] filter, edges reflected."""
  x = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
  x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def _conv3(c, features, x_BHWC, name, stride=1):
  init = _uniform(9 * x_BHWC.shape[-1])
  return Conv(c, features, 3, init, stride=stride, name=name)(x_BHWC)


def _dense(c, features, x_BF, name):
  init = _uniform(x_BF.shape[-1])
  return nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name)(x_BF)


def _normal(mean: float = 0.0):
  """N(mean, 0.02), as PatchGAN starts."""
  return lambda key, shape, dtype=jnp.float32: (
    mean + 0.02 * jax.random.normal(key, shape, dtype)
  )


def _uniform(fan_in: int):
  """Uniform within fan_in**-0.5, PyTorch's default."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )
