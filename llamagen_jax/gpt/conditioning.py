"""What the sequence starts with: one class token, or the tokens of a caption.

Both embedders take `drop_B`: rows where it is True get the unconditional
embedding instead, in training for guidance's sake and in sampling for the
unconditional half of the batch.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.layers import INIT

GUIDANCE_WIDTH = 256  # of the sinusoid of a guidance strength
GUIDANCE_PERIOD = 10_000  # longest period of its waves


class ClassEmbedding(nn.Module):
  """Integer labels [B] -> [B, 1, D]; the last row of the table is "no class"."""

  config: GPTConfig

  @nn.compact
  def __call__(self, label_B, drop_B):
    c = self.config
    init = nn.with_logical_partitioning(INIT, (None, "embed"))
    table = self.param("table", init, (c.num_classes + 1, c.dim))
    label_B = jnp.where(drop_B, c.num_classes, label_B)
    return jnp.take(table, label_B, axis=0)[:, None].astype(c.dtype)


class CaptionEmbedding(nn.Module):
  """Caption features [B, P, C] -> [B, P, D] by a two-layer perceptron.

  `unconditional` is a fixed random buffer: it is stored with the weights, and
  never trained.
  """

  config: GPTConfig

  @nn.compact
  def __call__(self, features_BPC, drop_B):
    c = self.config
    fixed_init = nn.initializers.normal(stddev=c.caption_dim**-0.5)
    in_init = nn.with_logical_partitioning(INIT, (None, "embed"))
    out_init = nn.with_logical_partitioning(INIT, ("embed", None))
    fixed = self.param("unconditional", fixed_init, (c.caption_tokens, c.caption_dim))
    in_CD = self.param("in", in_init, (c.caption_dim, c.dim)).astype(c.dtype)
    out_DD = self.param("out", out_init, (c.dim, c.dim)).astype(c.dtype)
    fixed_PC = jax.lax.stop_gradient(fixed)
    x_BPC = jnp.where(drop_B[:, None, None], fixed_PC, features_BPC).astype(c.dtype)
    return nn.gelu(x_BPC @ in_CD, approximate=True) @ out_DD


class GuidanceEmbedding(nn.Module):
  """Guidance strengths beta [B] -> [B, 1, D], added to the class token.

  A sinusoid of 1000 beta and a two-layer perceptron, as of a diffusion model's time
  (GFT, arXiv 2501.15420, section 4).
  """

  config: GPTConfig

  @nn.compact
  def __call__(self, beta_B):
    c = self.config
    in_init = nn.with_logical_partitioning(INIT, (None, "embed"))
    out_init = nn.with_logical_partitioning(INIT, ("embed", None))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
    in_ED = self.param("in", in_init, (GUIDANCE_WIDTH, c.dim))
    in_bias_D = self.param("in_bias", bias_init, (c.dim,))
    out_DD = self.param("out", out_init, (c.dim, c.dim))
    out_bias_D = self.param("out_bias", bias_init, (c.dim,))
    half = GUIDANCE_WIDTH // 2
    frequencies_H = jnp.exp(-math.log(GUIDANCE_PERIOD) * jnp.arange(half) / half)
    angles_BH = 1000.0 * beta_B.astype(jnp.float32)[:, None] * frequencies_H
    x_BE = jnp.concatenate([jnp.cos(angles_BH), jnp.sin(angles_BH)], axis=-1)
    x_BD = nn.silu(x_BE @ in_ED + in_bias_D) @ out_DD + out_bias_D
    return x_BD[:, None].astype(c.dtype)


def embed_condition(config: GPTConfig, **kwargs) -> nn.Module:
  """The embedder that the config asks for."""
  kind = ClassEmbedding if config.condition == "class" else CaptionEmbedding
  return kind(config, **kwargs)


def embed_prefix(
  config: GPTConfig,
  params: dict[str, Any],
  condition: jax.Array,
  drop_B: jax.Array,
  guidance_beta_B: jax.Array | None = None,
) -> jax.Array:
  """Returns the tokens that a sequence starts with, [B, P, D].

  Args:
    config: of the model.
    params: of the model, all of them.
    condition: labels [B] or caption features [B, P, C].
    drop_B: rows that get the unconditional embedding.
    guidance_beta_B: guidance strengths of a guidance-free model.
  """
  embedder = embed_condition(config)
  x_BPD = embedder.apply({"params": params["condition"]}, condition, drop_B)
  if guidance_beta_B is None:
    return x_BPD
  guidance = GuidanceEmbedding(config)
  return x_BPD + guidance.apply({"params": params["guidance"]}, guidance_beta_B)


def visible_tokens(
  config: GPTConfig, condition_mask_BP: jax.Array | None, length: int
) -> jax.Array | None:
  """False [B, length] on the padding of captions; None where there is none."""
  if condition_mask_BP is None:
    return None
  return jnp.pad(
    condition_mask_BP.astype(bool),
    ((0, 0), (0, length - config.prefix_tokens)),
    constant_values=True,
  )


def attention_mask(
  config: GPTConfig,
  condition_mask_BP: jax.Array | None,
  position_T: jax.Array,
  length: int | None = None,
) -> jax.Array:
  """Which of `length` keys the tokens at `position_T` see, bool [B or 1, T, length].

  Causal; the padding of a caption is hidden from every position but itself
  (a row without any visible key would have no softmax). The positions may also
  be [B, T].
  """
  length = length or config.length
  query, key_S = position_T[..., None], jnp.arange(length)
  causal = key_S <= query
  if causal.ndim == 2:
    causal = causal[None]
  visible_BS = visible_tokens(config, condition_mask_BP, length)
  if visible_BS is None:
    return causal
  return (causal & visible_BS[:, None, :]) | (key_S == query)
