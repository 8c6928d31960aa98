"""The VQGAN autoencoder and its relatives: images to codes and back.

A continuous one, the VAE of latent diffusion, has float latents in the place of codes.
Images are [B, H, W, 3] in [-1, 1]. The module names follow the published
state dict of LlamaGen; level 0 of the decoder has the lowest resolution.
"""

from collections.abc import Callable
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

# Rows [B, h, w, C] and the codebook [K, C] -> rows.
Perturb = Callable[[jax.Array, jax.Array], jax.Array]


class Conv(nn.Module):
  """Square convolution; kernels start as PyTorch's do by default, biases at 0."""

  config: TokenizerConfig
  features: int
  size: int = 3
  stride: int = 1
  bias: bool = True
  upsample: bool = False  # of the image upsampled by 2, nearest neighbours, size 3

  @nn.compact
  def __call__(self, x_BHWC):
    dtype, channels = self.config.dtype, x_BHWC.shape[-1]
    init = functools.partial(_uniform, (channels * self.size**2) ** -0.5)
    kernel_SSCF = self.param(
      "kernel",
      nn.with_logical_partitioning(init, (None, None, None, "conv_out")),
      (self.size, self.size, channels, self.features),
      jnp.float32,
    ).astype(dtype)
    x_BHWC = x_BHWC.astype(dtype)
    if self.upsample:
      x_BHWC = convolve_upsampled(x_BHWC, kernel_SSCF)
    else:
      # Downsampling pads on the bottom and right only.
      padding = "SAME" if self.stride == 1 else ((0, 1), (0, 1))
      x_BHWC = _convolve(x_BHWC, kernel_SSCF, padding, self.stride)
    if not self.bias:
      return x_BHWC
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    bias_F = self.param("bias", zeros, (self.features,), jnp.float32)
    return x_BHWC + bias_F.astype(dtype)


def _convolve(x_BHWC, kernel_SSCF, padding, stride: int = 1):
  return jax.lax.conv_general_dilated(
    x_BHWC, kernel_SSCF, (stride, stride), padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


def convolve_upsampled(x_BHWC: jax.Array, kernel_33CF: jax.Array) -> jax.Array:
  """Convolves images upsampled by 2 (nearest neighbours), from the small images.

  A window over the large image covers 2x2 of the small one's pixels, so each of
  the 2x2 parities of an output pixel is a 2x2 convolution of the small image,
  whose kernel sums the rows and columns that fall on one pixel: 4/9 of the products.

  Returns:
    [B, 2 H, 2 W, F].
  """
  B, H, W, _ = x_BHWC.shape

  def fold(kernel, axis, parity):
    """Sums the taps that fall on the first and on the second of two pixels."""
    first, middle, last = jnp.split(kernel, 3, axis)
    pair = (first, middle + last) if parity == 0 else (first + middle, last)
    return jnp.concatenate(pair, axis)

  parities = []
  for i, j in np.ndindex(2, 2):
    kernel_22CF = fold(fold(kernel_33CF, 0, i), 1, j)
    parities.append(_convolve(x_BHWC, kernel_22CF, ((1 - i, i), (1 - j, j))))
  y_BHWijF = jnp.stack(parities, axis=3).reshape(B, H, W, 2, 2, -1)
  return y_BHWijF.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, -1)


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
    x_BHWC = group_norm(x_BHWC, scale_C, bias_C, c.norm_groups, GROUP_NORM_EPS).astype(
      c.dtype
    )
    return nn.swish(x_BHWC) if self.swish else x_BHWC


def group_norm(
  x_BHWC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, eps: float
) -> jax.Array:
  """Normalises every group of channels to mean 0, variance 1 (arXiv 1803.08494).

  In float32, with the exact variance. Sums over pixels first and over a group's
  channels then -> channels stay in a vector's lanes, which takes two thirds of the
  time of Flax 0.12's GroupNorm on large images on a CPU.
  """

  def group_mean(x_BHWC):
    mean_BC = jnp.mean(x_BHWC, axis=(1, 2))
    mean_BG = jnp.mean(mean_BC.reshape(len(mean_BC), groups, -1), axis=-1)
    return jnp.repeat(mean_BG, mean_BC.shape[-1] // groups, axis=-1)[:, None, None]

  x_BHWC = x_BHWC.astype(jnp.float32)
  mean_B11C = group_mean(x_BHWC)
  variance_B11C = group_mean(jnp.square(x_BHWC - mean_B11C))
  scale_B11C = jax.lax.rsqrt(variance_B11C + eps) * scale_C
  return (x_BHWC - mean_B11C) * scale_B11C + bias_C


class ResBlock(nn.Module):
  """x + conv(dropout(swish(norm(conv(swish(norm(x)))))))."""

  config: TokenizerConfig
  features: int
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c, plain = self.config, self.config.blocks != "maskgit"
    conv = functools.partial(Conv, c, self.features, bias=plain)
    h = conv(name="conv1")(NormSwish(c, name="norm1")(x_BHWC))
    h = NormSwish(c, name="norm2")(h)
    h = nn.Dropout(c.dropout, deterministic=not self.training)(h)
    h = conv(name="conv2")(h)
    if x_BHWC.shape[-1] != self.features:
      # MaskGIT's published code applies the shortcut to the block's own output.
      skipped = x_BHWC if plain else h
      x_BHWC = conv(size=1, name="nin_shortcut")(skipped)
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
  """Residual, attention (not in MaskGIT), residual at the lowest resolution."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c, features = self.config, self.config.channels[-1]
    x_BHWC = ResBlock(c, features, self.training, name="0")(x_BHWC)
    if c.blocks == "maskgit":
      return ResBlock(c, features, self.training, name="1")(x_BHWC)
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
  """Images [B, H, W, 3] -> [B, h, w, moments * latent_width]."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c, plain = self.config, self.config.blocks != "maskgit"
    x_BHWC = Conv(c, c.width, bias=plain, name="conv_in")(x_BHWC)
    for i, features in enumerate(c.channels):
      last = i == len(c.channels) - 1
      attention = last and c.blocks == "vqgan"
      x_BHWC = Level(
        c, features, c.res_blocks, attention, self.training, name=f"level_{i}"
      )(x_BHWC)
      if not last and plain:
        x_BHWC = Conv(c, features, stride=2, name=f"downsample_{i}")(x_BHWC)
      elif not last:
        x_BHWC = nn.avg_pool(x_BHWC, (2, 2), (2, 2))
    x_BHWC = Middle(c, self.training, name="mid")(x_BHWC)
    x_BHWC = NormSwish(c, name="norm_out")(x_BHWC)
    features, size = c.moments * c.latent_width, 3 if plain else 1
    return Conv(c, features, size=size, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
  """[B, h, w, latent_width] -> images [B, H, W, 3], float32."""

  config: TokenizerConfig
  training: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c, plain = self.config, self.config.blocks != "maskgit"
    x_BHWC = Conv(c, c.channels[-1], name="conv_in")(x_BHWC)
    x_BHWC = Middle(c, self.training, name="mid")(x_BHWC)
    for i, features in enumerate(reversed(c.channels)):
      first, last = i == 0, i == len(c.channels) - 1
      attention = first and c.blocks == "vqgan"
      x_BHWC = Level(
        c, features, c.res_blocks + plain, attention, self.training, name=f"level_{i}"
      )(x_BHWC)
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
    if c.quant_conv:
      self.quant_conv = Conv(c, c.moments * c.codebook_dim, size=1)
      self.post_quant_conv = Conv(c, c.latent_width, size=1)
    if not c.continuous:
      self.codebook = self.param(
        "codebook", _init_codebook(c), (c.codebook_size, c.codebook_dim)
      )

  def __call__(
    self, images_BHWC: jax.Array, perturb: Perturb | None = None
  ) -> tuple[jax.Array, quantizer.Quantized | None]:
    """Returns reconstructions [B, H, W, 3] and the quantizer's output, if there is one.

    Args:
      images_BHWC: in [-1, 1].
      perturb: changes the rows that the decoder sees, in training.
    """
    c, latents = self.config, self.latents(images_BHWC)
    if c.continuous:
      return self._decode_latents(latents), None
    quantized = quantizer.quantize(c, latents, self.codebook)
    latents = quantized.latents
    if perturb is not None:
      rows_KC = self.codebook
      rows_KC = quantizer.l2_normalize(rows_KC) if c.l2_norm else rows_KC
      latents = perturb(latents, rows_KC)
    return self._decode_latents(latents), quantized

  def latents(self, images_BHWC: jax.Array) -> jax.Array:
    """Returns the images' float32 latents [B, h, w, C], not yet normalised."""
    c = self.config
    if c.pixel_range == "unit":
      images_BHWC = (images_BHWC + 1) / 2
    z_BhwC = self.encoder(images_BHWC.astype(c.dtype))
    z_BhwC = self.quant_conv(z_BhwC) if c.quant_conv else z_BhwC
    return z_BhwC[..., : c.codebook_dim].astype(jnp.float32)  # the means come first

  def encode(self, images_BHWC: jax.Array) -> jax.Array:
    """Returns the codes of images [B, H, W, 3] in [-1, 1].

    int32 [B, h, w], or the float32 latents [B, h, w, C] of a continuous autoencoder.
    """
    latents = self.latents(images_BHWC)
    if self.config.continuous:
      return latents
    return quantizer.codes_of(self.config, latents, self.codebook)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns float32 images [B, H, W, 3], about [-1, 1], of what `encode` returns."""
    if self.config.continuous:
      return self._decode_latents(codes)
    return self._decode_latents(quantizer.lookup(self.config, codes, self.codebook))

  def _decode_latents(self, latents_BhwC):
    c = self.config
    x_BhwC = latents_BhwC.astype(c.dtype)
    x_BhwC = self.post_quant_conv(x_BhwC) if c.quant_conv else x_BhwC
    images_BHWC = self.decoder(x_BhwC)
    return images_BHWC * 2 - 1 if c.pixel_range == "unit" else images_BHWC


def _init_codebook(config: TokenizerConfig):
  """Uniform(+-1/K) rows, put on the sphere where codes live there."""

  def init(key, shape):
    rows = _uniform(1 / config.codebook_size, key, shape, jnp.float32)
    return quantizer.l2_normalize(rows) if config.l2_norm else rows

  return init


def encode(config: TokenizerConfig, params: Any, images_BHWC: jax.Array) -> jax.Array:
  """Returns codes or latents of images [B, H, W, 3] in [-1, 1]; see `VQModel`."""
  return _apply(config, params, images_BHWC, "encode")


def decode(config: TokenizerConfig, params: Any, codes: jax.Array) -> jax.Array:
  """Returns float32 images [B, H, W, 3], about [-1, 1], of codes or latents."""
  return _apply(config, params, codes, "decode")


def _apply(config, params, x, method):
  def apply(x):
    return VQModel(config).apply({"params": params}, x, method=method)

  # A batch of eight's activations fit into no cache of a CPU -> images one after the
  # other are a fifth faster. Devices that share a batch cannot scan it, unless each
  # holds its own rows, under `shard_map`.
  alone = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
  if jax.default_backend() == "cpu" and alone:
    return jax.lax.map(lambda image: apply(image[None])[0], x)
  return apply(x)


@functools.partial(jax.jit, static_argnames="config")
def init_tokenizer(config: TokenizerConfig, key: jax.Array) -> Any:
  """Returns new float32 parameters, boxed with the names of their axes."""
  side = config.downsample
  return VQModel(config).init(key, jnp.zeros((1, side, side, 3)))["params"]
