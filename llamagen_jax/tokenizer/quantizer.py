"""Vector quantisation on the unit sphere, as free functions.

VQ-VAE (arXiv 1711.00937) with the small, l2-normalised codes of ViT-VQGAN
(arXiv 2110.04627). Axes: N latents (any leading axes), K codes, C code width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llamagen_jax.tokenizer.config import TokenizerConfig

ENTROPY_TEMPERATURE = 0.01
ENTROPY_EPSILON = 1e-5  # the original's, inside the log of the mean
NORM_FLOOR = 1e-12


class Quantized(NamedTuple):
  latents: jax.Array  # [..., C] codebook rows, straight-through to the encoder
  codes: jax.Array  # int32 [...]
  losses: dict[str, jax.Array]  # scalars: codebook, commitment, entropy
  inputs: jax.Array  # [..., C] what was compared with the rows


def l2_normalize(x: jax.Array) -> jax.Array:
  """Returns x with length 1 along the last axis; zeros stay, with a gradient of 0."""
  squared = jnp.sum(x * x, axis=-1, keepdims=True)
  zero = squared == 0
  norm = jnp.sqrt(jnp.where(zero, 1.0, squared))
  return jnp.where(zero, 0.0, x / jnp.maximum(norm, NORM_FLOOR))


def squared_distances(z_NC: jax.Array, codebook_KC: jax.Array) -> jax.Array:
  """Returns [N, K]. At HIGHEST precision: bf16 products would pick other codes."""
  dots_NK = dot_products(z_NC, codebook_KC)
  z_squared = jnp.sum(z_NC**2, axis=1, keepdims=True)
  return z_squared + jnp.sum(codebook_KC**2, axis=1) - 2 * dots_NK


def dot_products(z_NC: jax.Array, codebook_KC: jax.Array) -> jax.Array:
  """Returns [N, K], at HIGHEST precision, too."""
  return jnp.matmul(z_NC, codebook_KC.T, precision=jax.lax.Precision.HIGHEST)


def nearest_codes(z: jax.Array, codebook_KC: jax.Array) -> jax.Array:
  """Returns the index of the nearest codebook row of every latent, int32 [...]."""
  distances_NK = squared_distances(z.reshape(-1, z.shape[-1]), codebook_KC)
  return jnp.argmin(distances_NK, axis=1).reshape(z.shape[:-1])


def codes_of(
  config: TokenizerConfig, z: jax.Array, codebook_KC: jax.Array
) -> jax.Array:
  """Returns the codes int32 [...] of float32 latents [..., C] as the encoder gives."""
  if config.l2_norm:
    z, codebook_KC = l2_normalize(z), l2_normalize(codebook_KC)
  if config.quantizer == "vq":
    return nearest_codes(z, codebook_KC)
  dots_NK = dot_products(z.reshape(-1, z.shape[-1]), codebook_KC)
  return jnp.argmax(dots_NK, axis=1).reshape(z.shape[:-1])


def entropy_loss(logits_NK: jax.Array) -> jax.Array:
  """Returns the mean entropy of the assignments minus the entropy of their mean.

  Low when every latent is sure of its code and all codes are used (MaskGIT's
  tokenizer; MAGVIT-v2, arXiv 2310.05737, section 3.2).

  Args:
    logits_NK: of the assignments before the temperature: negative distances or dot
      products.
  """
  log_probs_NK = jax.nn.log_softmax(logits_NK / ENTROPY_TEMPERATURE, axis=-1)
  probs_NK = jnp.exp(log_probs_NK)
  sample_entropy = -jnp.mean(jnp.sum(probs_NK * log_probs_NK, axis=-1))
  mean_K = jnp.mean(probs_NK, axis=0)
  mean_entropy = -jnp.sum(mean_K * jnp.log(mean_K + ENTROPY_EPSILON))
  return sample_entropy - mean_entropy


def quantize(
  config: TokenizerConfig, z: jax.Array, codebook_KC: jax.Array
) -> Quantized:
  """Replaces float32 latents [..., C] by codebook rows, with the losses for it.

  Losses are means over elements and carry their weights. With the quantizer "vq",
  gradients reach the encoder through the straight-through estimate and the commitment
  loss, the codebook through the codebook loss (and both through the entropy loss).
  """
  if config.l2_norm:
    z, codebook_KC = l2_normalize(z), l2_normalize(codebook_KC)
  if config.quantizer == "ibq":
    return _quantize_ibq(config, z, codebook_KC)
  codes = nearest_codes(z, codebook_KC)
  z_q = jnp.take(codebook_KC, codes, axis=0)
  losses = {
    "codebook": jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2),
    "commitment": config.commitment * jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2),
    "entropy": jnp.zeros(()),
  }
  if config.entropy_ratio:
    distances_NK = squared_distances(z.reshape(-1, z.shape[-1]), codebook_KC)
    losses["entropy"] = config.entropy_ratio * entropy_loss(-distances_NK)
  return Quantized(z + jax.lax.stop_gradient(z_q - z), codes, losses, z)


def _quantize_ibq(config, z, codebook_KC) -> Quantized:
  """Index backpropagation (arXiv 2412.02692, sections 3.2 and 3.3).

  The one-hot of the chosen row is straight-through to the softmax over all rows, so
  every row of the codebook gets a gradient from every latent.
  """
  stop = jax.lax.stop_gradient
  z_NC = z.reshape(-1, z.shape[-1])
  logits_NK = dot_products(z_NC, codebook_KC)
  codes_N = jnp.argmax(logits_NK, axis=1)
  soft_NK = jax.nn.softmax(logits_NK, axis=-1)
  hard_NK = jax.nn.one_hot(codes_N, len(codebook_KC), dtype=soft_NK.dtype)
  highest = jax.lax.Precision.HIGHEST
  z_q_NC = jnp.matmul(soft_NK + stop(hard_NK - soft_NK), codebook_KC, precision=highest)
  rows_NC = jnp.take(codebook_KC, codes_N, axis=0)
  losses = {
    "codebook": jnp.mean((z_q_NC - z_NC) ** 2)
    + config.commitment * jnp.mean((rows_NC - stop(z_NC)) ** 2),
    "commitment": jnp.mean((stop(rows_NC) - z_NC) ** 2),
    "entropy": jnp.zeros(()),
  }
  if config.entropy_ratio:
    losses["entropy"] = config.entropy_ratio * entropy_loss(logits_NK)
  return Quantized(z_q_NC.reshape(z.shape), codes_N.reshape(z.shape[:-1]), losses, z)


def lookup(
  config: TokenizerConfig, codes: jax.Array, codebook_KC: jax.Array
) -> jax.Array:
  """Returns the rows of codes that the decoder sees; NaN for codes out of range."""
  codes = jnp.where(codes < 0, len(codebook_KC), codes)  # take counts them from the end
  rows = jnp.take(codebook_KC, codes, axis=0, mode="fill")
  return l2_normalize(rows) if config.l2_norm else rows
