"""The transformer: condition tokens and codes in, logits of the codes out.

Axes: B batch, T image codes, P condition tokens, S = P + T - 1 positions,
D model, V vocabulary, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llamagen_jax.gpt.conditioning import (
  attention_mask,
  embed_condition,
  visible_tokens,
)
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.layers import INIT, Block, rms_norm
from llamagen_jax.gpt.rope import rope_table
from llamagen_jax.parallel.mesh import constrain

REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class GPT(nn.Module):
  """Decoder-only Llama over the codes of an image (arXiv 2406.06525, sec. 2.2).

  Parameters are stacked over layers: params["layers"] leaves start with axis L.
  """

  config: GPTConfig
  training: bool = False

  def setup(self):
    c = self.config
    embed_init = nn.with_logical_partitioning(INIT, ("vocab", "embed"))
    norm_init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    # A zero head makes the first loss exactly ln(vocab_size).
    head_init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "vocab"))
    self.condition = embed_condition(c)
    self.code_embedding = self.param(
      "code_embedding", embed_init, (c.vocab_size, c.dim)
    )
    self.layers = _scanned(Block, c)(c, self.training)
    self.norm = self.param("norm", norm_init, (c.dim,))
    self.head = self.param("head", head_init, (c.dim, c.vocab_size))
    self.embedding_dropout = nn.Dropout(
      c.embedding_dropout, deterministic=not self.training
    )

  def __call__(
    self,
    codes_BT: jax.Array,
    condition: jax.Array,
    condition_mask: jax.Array | None = None,
    drop_B: jax.Array | None = None,
  ) -> jax.Array:
    """Logits of every code given the condition and the codes before it.

    Args:
      codes_BT: integer codes in raster order; the last one is not looked at.
      condition: labels [B] or caption features [B, P, C].
      condition_mask: [B, P], 0 on the padding of a caption.
      drop_B: rows that get the unconditional embedding.

    Returns:
      float32 [B, T, V]; logits[:, t] predicts codes[:, t].
    """
    features = self.features(codes_BT, condition, condition_mask, drop_B)
    return project(features, self.head)

  def features(self, codes_BT, condition, condition_mask=None, drop_B=None):
    """The normalised hidden states [B, T, D] that the head projects to logits."""
    c = self.config
    if drop_B is None:
      drop_B = jnp.zeros(codes_BT.shape[0], bool)
    prefix_BPD = self.condition(condition, drop_B)
    codes_BTD = embed_codes(self.code_embedding, codes_BT[:, :-1], c.dtype)
    x_BSD = self.embedding_dropout(jnp.concatenate([prefix_BPD, codes_BTD], axis=1))
    x_BSD = constrain(x_BSD, "batch", None, None)

    rates_L = jnp.linspace(0.0, c.drop_path, c.layers)
    if c.attention == "splash":
      mask = visible_tokens(c, condition_mask, c.length)
    else:
      mask = attention_mask(c, condition_mask, jnp.arange(c.length))
    x_BSD, _ = self.layers(x_BSD, rates_L, rope_table(c), mask)
    return rms_norm(x_BSD[:, c.prefix_tokens - 1 :], self.norm, c.norm_eps)


def _scanned(block, config: GPTConfig):
  """`block` run over the layers by one compiled body, rematerialised or not."""
  if config.remat != "none":
    # Inside a scan the compiler cannot undo rematerialisation by sharing.
    policy = REMAT_POLICIES[config.remat]
    block = nn.remat(block, policy=policy, prevent_cse=False)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, nn.broadcast, nn.broadcast),
    length=config.layers,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


def init_gpt(config: GPTConfig, key: jax.Array) -> Any:
  """Fresh float32 parameters, boxed with the names of their axes."""
  codes = jnp.zeros((1, config.image_tokens), jnp.int32)
  condition = jnp.zeros(1, jnp.int32)
  if config.condition == "caption":
    condition = jnp.zeros((1, config.caption_tokens, config.caption_dim))
  return GPT(config).init(key, codes, condition)["params"]


def embed_codes(table_VD: jax.Array, codes_BT: jax.Array, dtype: str) -> jax.Array:
  """Codes -> [B, T, D]. Codes out of range become NaN rather than a neighbour."""
  return jnp.take(table_VD, codes_BT, axis=0, mode="fill").astype(dtype)


def project(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
  """Hidden states -> float32 logits [B, T, V]."""
  return jnp.einsum(
    "BTD,DV->BTV",
    x_BTD,
    head_DV.astype(x_BTD.dtype),
    preferred_element_type=jnp.float32,
  )
