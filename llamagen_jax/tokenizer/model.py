"""The VQGAN autoencoder: images to codes and back.

Images are [B, H, W, 3] in [-1, 1]. The module names follow the published
state dict, level 0 of the decoder being the lowest resolution.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.parallel.mesh import constrain
from llamagen_jax.tokenizer import quantizer
from llamagen_jax.tokenizer.config import TokenizerConfig

GROUP_NORM_EPS = 1e-6


class Conv(nn.Module):
  """Square convolution; kernels start as PyTorch's do by default, biases at 0."""

  config: TokenizerConfig
  features: int
  size: int = 3
  stride: int = 1
  upsample: bool = False  # to twice the sides first, by nearest neighbours

  @nn.compact
  def __call__(self, x_BHWC):
    # Downsampling pads on the bottom and right only.
    padding = "SAME" if self.stride == 1 else ((0, 1), (0, 1))
    bound = (x_BHWC.shape[-1] * self.size**2) ** -0.5
    init = functools.partial(_uniform, bound)
    conv = nn.Conv(
      self.features,
      (self.size, self.size),
      self.stride,
      padding,
      dtype=self.config.dtype,
      conv_general_dilated=(
        _enlarge_and_convolve if self.upsample else jax.lax.conv_general_dilated
      ),
      kernel_init=nn.with_logical_partitioning(init, (None, None, None, "conv_out")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
    )
    nn.share_scope(self, conv)
    return conv(x_BHWC)


def _enlarge_and_convolve(x_BHWC, kernel_33CF, *args, dimension_numbers, **kwargs):
  """A 3x3 convolution of the image enlarged by 2, from the small image.

  A window over the large image covers 2x2 of the small one's pixels, so each of
  the 2x2 parities of an output pixel is a 2x2 convolution of the small image,
  whose kernel sums the rows and columns that fall on one pixel: 4/9 of the products.
  """
  del args, kwargs  # plain stride and padding
  B, H, W, _ = x_BHWC.shape

  def fold(kernel, axis, parity):
    """Sums what falls on the first and on the second of two pixels."""
    first, middle, last = jnp.split(kernel, 3, axis)
    pair = (first, middle + last) if parity == 0 else (first + middle, last)
    return jnp.concatenate(pair, axis)

  parities = []
  for i, j in np.ndindex(2, 2):
    kernel = fold(fold(kernel_33CF, 0, i), 1, j)
    padding = ((1 - i, i), (1 - j, j))
    parities.append(
      jax.lax.conv_general_dilated(
        x_BHWC, kernel, (1, 1), padding, dimension_numbers=dimension_numbers
      )
    )
  y_BHiWjF = jnp.stack(parities, axis=3).reshape(B, H, W, 2, 2, -1)
  return y_BHiWjF.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, -1)


def _uniform(bound, key, shape, dtype):
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class NormSwish(nn.Module):
  """GroupNorm, then x * sigmoid(x)."""

  config: TokenizerConfig
  swish: bool = True

  @nn.compact
  def __call__(self, x_BHWC):
    c, channels = self.config, x_BHWC.shape[-1:]
    scale_C = self.param("scale", nn.initializers.ones, channels)
    bias_C = self.param("bias", nn.initializers.zeros, channels)
    x_BHWC = group_norm(x_BHWC, scale_C, bias_C, c.norm_groups).astype(c.dtype)
    return nn.swish(x_BHWC) if self.swish else x_BHWC


def group_norm(
  x_BHWC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int
) -> jax.Array:
  """Images with mean 0 and variance 1 in every group of channels (arXiv 1803.08494).

  In float32, with the exact variance. Sums go over pixels first and over a group's
  channels then, so that channels stay in a vector's lanes: on a CPU that takes two
  thirds of Flax's time on large images.
  """

  def group_mean(x_BHWC):
    mean_BC = jnp.mean(x_BHWC, axis=(1, 2))
    mean_BG = jnp.mean(mean_BC.reshape(len(mean_BC), groups, -1), axis=-1)
    return jnp.repeat(mean_BG, mean_BC.shape[-1] // groups, axis=-1)[:, None, None]

  x_BHWC = x_BHWC.astype(jnp.float32)
  mean_B11C = group_mean(x_BHWC)
  variance_B11C = group_mean(jnp.square(x_BHWC - mean_B11C))
  scale_B11C = jax.lax.rsqrt(variance_B11C + GROUP_NORM_EPS) * scale_C
  return (x_BHWC - mean_B11C) * scale_B11C + bias_C


class ResBlock(nn.Module):
  """x + conv(dropout(swish(norm(conv(swish(norm(x)))))))."""

  config: TokenizerConfig
  features: int
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    h = Conv(c, self.features, name="conv1")(NormSwish(c, name="norm1")(x_BHWC))
    h = NormSwish(c, name="norm2")(h)
    h = nn.Dropout(c.dropout, deterministic=not self.training)(h)
    h = Conv(c, self.features, name="conv2")(h)
    if x_BHWC.shape[-1] != self.features:
      x_BHWC = Conv(c, self.features, size=1, name="nin_shortcut")(x_BHWC)
    return x_BHWC + h


class AttentionBlock(nn.Module):
  """Single-head self-attention over all positions of a feature map."""

  config: TokenizerConfig

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    B, H, W, C = x_BHWC.shape
    h = NormSwish(c, swish=False, name="norm")(x_BHWC)
    q_BNC, k_BNC, v_BNC = (
      Conv(c, C, size=1, name=name)(h).reshape(B, H * W, C) for name in "qkv"
    )
    scores_BNM = jnp.einsum(
      "BNC,BMC->BNM", q_BNC, k_BNC, preferred_element_type=jnp.float32
    )
    weights_BNM = jax.nn.softmax(scores_BNM * C**-0.5, axis=-1).astype(v_BNC.dtype)
    mixed = jnp.einsum("BNM,BMC->BNC", weights_BNM, v_BNC).reshape(B, H, W, C)
    return x_BHWC + Conv(c, C, size=1, name="proj_out")(mixed)


class Middle(nn.Module):
  """Residual, attention, residual at the lowest resolution."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c, features = self.config, self.config.channels[-1]
    x_BHWC = ResBlock(c, features, self.training, name="0")(x_BHWC)
    x_BHWC = AttentionBlock(c, name="1")(x_BHWC)
    return ResBlock(c, features, self.training, name="2")(x_BHWC)


class Level(nn.Module):
  """Residual blocks at one resolution, each followed by attention if asked."""

  config: TokenizerConfig
  features: int
  blocks: int
  attention: bool
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    remat = nn.remat if self.config.remat and self.training else lambda block: block
    res_block, attention_block = remat(ResBlock), remat(AttentionBlock)
    for i in range(self.blocks):
      res = res_block(self.config, self.features, self.training, name=f"res_{i}")
      x_BHWC = res(x_BHWC)
      if self.attention:
        x_BHWC = attention_block(self.config, name=f"attn_{i}")(x_BHWC)
    return constrain(x_BHWC, "batch", None, None, None)


class Encoder(nn.Module):
  """Images [B, H, W, 3] -> [B, h, w, latent_width]."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    x_BHWC = Conv(c, c.width, name="conv_in")(x_BHWC)
    for i, features in enumerate(c.channels):
      last = i == len(c.channels) - 1
      level = Level(c, features, c.res_blocks, last, self.training, name=f"level_{i}")
      x_BHWC = level(x_BHWC)
      if not last:
        x_BHWC = Conv(c, features, stride=2, name=f"downsample_{i}")(x_BHWC)
    x_BHWC = Middle(c, self.training, name="mid")(x_BHWC)
    x_BHWC = NormSwish(c, name="norm_out")(x_BHWC)
    return Conv(c, c.latent_width, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
  """[B, h, w, latent_width] -> images [B, H, W, 3], float32."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    x_BHWC = Conv(c, c.channels[-1], name="conv_in")(x_BHWC)
    x_BHWC = Middle(c, self.training, name="mid")(x_BHWC)
    for i, features in enumerate(reversed(c.channels)):
      first, last = i == 0, i == len(c.channels) - 1
      blocks = c.res_blocks + 1
      level = Level(c, features, blocks, first, self.training, name=f"level_{i}")
      x_BHWC = level(x_BHWC)
      if not last:
        x_BHWC = Conv(c, features, upsample=True, name=f"upsample_{i}")(x_BHWC)
    x_BHWC = NormSwish(c, name="norm_out")(x_BHWC)
    return Conv(c, 3, name="conv_out")(x_BHWC).astype(jnp.float32)


class VQModel(nn.Module):
  """Encoder, codebook and decoder; apply with method="encode" or "decode"."""

  config: TokenizerConfig
  training: bool = False

  def setup(self):
    c = self.config
    self.encoder = Encoder(c, self.training)
    self.decoder = Decoder(c, self.training)
    self.quant_conv = Conv(c, c.codebook_dim, size=1)
    self.post_quant_conv = Conv(c, c.latent_width, size=1)
    self.codebook = self.param(
      "codebook", _init_codebook(c), (c.codebook_size, c.codebook_dim)
    )

  def __call__(self, images_BHWC: jax.Array) -> tuple[jax.Array, quantizer.Quantized]:
    """Reconstructions [B, H, W, 3] and what the quantizer did."""
    quantized = quantizer.quantize(
      self.config, self.latents(images_BHWC), self.codebook
    )
    return self._decode_latents(quantized.latents), quantized

  def latents(self, images_BHWC: jax.Array) -> jax.Array:
    """Images -> float32 latents [B, h, w, C] before normalising."""
    x_BHWC = images_BHWC.astype(self.config.dtype)
    return self.quant_conv(self.encoder(x_BHWC)).astype(jnp.float32)

  def encode(self, images_BHWC: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1] -> int32 codes [B, h, w]."""
    z, codebook = self.latents(images_BHWC), self.codebook
    if self.config.l2_norm:
      z, codebook = quantizer.l2_normalize(z), quantizer.l2_normalize(codebook)
    return quantizer.nearest_codes(z, codebook)

  def decode(self, codes_Bhw: jax.Array) -> jax.Array:
    """Integer codes [B, h, w] -> float32 images [B, H, W, 3], about [-1, 1]."""
    return self._decode_latents(quantizer.lookup(self.config, codes_Bhw, self.codebook))

  def _decode_latents(self, latents_BhwC):
    latents_BhwC = latents_BhwC.astype(self.config.dtype)
    return self.decoder(self.post_quant_conv(latents_BhwC))


def _init_codebook(config: TokenizerConfig):
  """Uniform(+-1/K) rows, put on the sphere where codes live there."""

  def init(key, shape):
    rows = _uniform(1 / config.codebook_size, key, shape, jnp.float32)
    return quantizer.l2_normalize(rows) if config.l2_norm else rows

  return init


def encode(config: TokenizerConfig, params: Any, images_BHWC: jax.Array) -> jax.Array:
  """Images [B, H, W, 3] in [-1, 1] -> int32 codes [B, h, w]."""
  return _apply(config, params, images_BHWC, "encode")


def decode(config: TokenizerConfig, params: Any, codes_Bhw: jax.Array) -> jax.Array:
  """Integer codes [B, h, w] -> float32 images [B, H, W, 3], about [-1, 1]."""
  return _apply(config, params, codes_Bhw, "decode")


def _apply(config, params, x, method):
  def apply(x):
    return VQModel(config).apply({"params": params}, x, method=method)

  # A CPU takes an image after the other a fifth faster than a batch of eight,
  # whose activations fit into no cache. Devices that share a batch do not scan it,
  # unless each of them has its part to itself, under `shard_map`.
  alone = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
  if jax.default_backend() == "cpu" and alone:
    return jax.lax.map(lambda image: apply(image[None])[0], x)
  return apply(x)


def init_tokenizer(config: TokenizerConfig, key: jax.Array) -> Any:
  """Fresh float32 parameters, boxed with the names of their axes."""
  side = config.downsample
  return VQModel(config).init(key, jnp.zeros((1, side, side, 3)))["params"]
