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


class Quantized(NamedTuple):
  latents: jax.Array  # [..., C] codebook rows, straight-through to the encoder
  codes: jax.Array  # int32 [...]
  losses: dict[str, jax.Array]  # scalars: codebook, commitment, entropy
  inputs: jax.Array  # [..., C] what was compared with the rows


def l2_normalize(x: jax.Array) -> jax.Array:
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.maximum(norm, 1e-12)


def squared_distances(z_NC: jax.Array, codebook_KC: jax.Array) -> jax.Array:
  """[N, K]. At HIGHEST precision: bf16 products would pick other codes."""
  dots_NK = jnp.matmul(z_NC, codebook_KC.T, precision=jax.lax.Precision.HIGHEST)
  z_squared = jnp.sum(z_NC**2, axis=1, keepdims=True)
  return z_squared + jnp.sum(codebook_KC**2, axis=1) - 2 * dots_NK


def nearest_codes(z: jax.Array, codebook_KC: jax.Array) -> jax.Array:
  """Index of the nearest codebook row of every latent, int32 [...]."""
  distances_NK = squared_distances(z.reshape(-1, z.shape[-1]), codebook_KC)
  return jnp.argmin(distances_NK, axis=1).reshape(z.shape[:-1])


def entropy_loss(distances_NK: jax.Array) -> jax.Array:
  """Mean entropy of the assignments minus the entropy of their mean.

  Low when every latent is sure of its code and all codes are used
  (MaskGIT's tokenizer; MAGVIT-v2, arXiv 2310.05737, section 3.2).
  """
  scores_NK = -distances_NK / ENTROPY_TEMPERATURE
  probs_NK = jax.nn.softmax(scores_NK, axis=-1)
  log_probs_NK = jax.nn.log_softmax(scores_NK, axis=-1)
  sample_entropy = -jnp.mean(jnp.sum(probs_NK * log_probs_NK, axis=-1))
  mean_K = jnp.mean(probs_NK, axis=0)
  mean_entropy = -jnp.sum(mean_K * jnp.log(mean_K + ENTROPY_EPSILON))
  return sample_entropy - mean_entropy


def quantize(
  config: TokenizerConfig, z: jax.Array, codebook_KC: jax.Array
) -> Quantized:
  """Replaces float32 latents [..., C] by codebook rows, with the losses for it.

  Losses are means over elements and carry their weights. Gradients reach the
  encoder through the straight-through estimate and the commitment loss, the
  codebook through the codebook loss (and both through the entropy loss).
  """
  if config.l2_norm:
    z, codebook_KC = l2_normalize(z), l2_normalize(codebook_KC)
  codes = nearest_codes(z, codebook_KC)
  z_q = jnp.take(codebook_KC, codes, axis=0)
  losses = {
    "codebook": jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2),
    "commitment": config.commitment * jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2),
    "entropy": jnp.zeros(()),
  }
  if config.entropy_ratio:
    distances_NK = squared_distances(z.reshape(-1, z.shape[-1]), codebook_KC)
    losses["entropy"] = config.entropy_ratio * entropy_loss(distances_NK)
  return Quantized(z + jax.lax.stop_gradient(z_q - z), codes, losses, z)


def lookup(
  config: TokenizerConfig, codes: jax.Array, codebook_KC: jax.Array
) -> jax.Array:
  """Codes -> the rows that the decoder sees; out of range gives NaN."""
  rows = jnp.take(codebook_KC, codes, axis=0, mode="fill")
  return l2_normalize(rows) if config.l2_norm else rows
