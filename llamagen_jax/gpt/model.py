"""The transformer: condition tokens and codes in, logits of the codes out.

Axes: B batch, T image codes, P condition tokens, S = P + T - 1 positions,
D model, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.conditioning import (
  GuidanceEmbedding,
  attention_mask,
  embed_condition,
  visible_tokens,
)
from llamagen_jax.gpt.config import KERNELS, GPTConfig
from llamagen_jax.gpt.layers import INIT, Block, product, rms_norm
from llamagen_jax.gpt.rope import rope_in_order, rope_table
from llamagen_jax.parallel.mesh import constrain
from llamagen_jax.sides import Sides, height_width

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
    if c.guidance_embedding:
      self.guidance = GuidanceEmbedding(c)
    if c.target_embedding:
      # At zero a model without it is left as it is.
      target_init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
      self.target_embedding = self.param(
        "target_embedding", target_init, (c.image_tokens, c.dim)
      )
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
    *,
    guidance_beta: jax.Array | None = None,
    order_BT: jax.Array | None = None,
    patch: int = 1,
  ) -> jax.Array:
    """Returns the logits of every code given the condition and the codes before it.

    Args:
      codes_BT: integer codes in raster order; the last one is not looked at.
      condition: labels [B] or caption features [B, P, C].
      condition_mask: [B, P], 0 on the padding of a caption.
      drop_B: rows that get the unconditional embedding.
      guidance_beta: [B], guidance strength of a guidance-free model; None = none.
      order_BT: a permutation of the codes' positions, the order to predict them in;
        None = raster order.
      patch: side of the squares of codes that are one token each, with the mean of
        their embeddings (next-patch prediction).

    Returns:
      float32 [B, T, V]; logits[:, t] predicts codes[:, t], or codes[:, order[t]], or
      with patches [B, T / patch**2, V], every code of patch t.
    """
    features = self.features(
      codes_BT, condition, condition_mask, drop_B,
      guidance_beta=guidance_beta, order_BT=order_BT, patch=patch,
    )  # fmt: skip
    return project(features, self.head)

  def features(
    self, codes_BT, condition, condition_mask=None, drop_B=None, *,
    guidance_beta=None, order_BT=None, patch=1,
  ):  # fmt: skip
    """Returns the normalised hidden states [B, T, D] that the head projects."""
    c = patch_config(self.config, patch)
    if drop_B is None:
      drop_B = jnp.zeros(codes_BT.shape[0], bool)
    prefix_BPD = self.condition(condition, drop_B)
    if c.guidance_embedding:
      # The module is called in any case, so that `init` makes its parameters.
      beta_B = jnp.ones(drop_B.shape) if guidance_beta is None else guidance_beta
      added_B1D = self.guidance(beta_B)
      if guidance_beta is not None:
        prefix_BPD = prefix_BPD + added_B1D
    if order_BT is not None:
      codes_BT = jnp.take_along_axis(codes_BT, order_BT, axis=1)
    if patch == 1:
      codes_BTD = embed_codes(self.code_embedding, codes_BT[:, :-1], c.dtype)
    else:
      codes_BTD = embed_codes(self.code_embedding, codes_BT, c.dtype)
      codes_BTD = patches(codes_BTD, self.config.grid, patch).mean(axis=2)[:, :-1]
    x_BSD = jnp.concatenate([prefix_BPD, codes_BTD], axis=1)
    if c.target_embedding and patch == 1:
      x_BSD = self._with_targets(x_BSD, order_BT)
    x_BSD = constrain(self.embedding_dropout(x_BSD), "batch", None, None)

    rates_L = jnp.linspace(0.0, c.drop_path, c.layers)
    rope = rope_table(c) if order_BT is None else rope_in_order(c, order_BT)
    if c.attention in KERNELS.values():
      mask = visible_tokens(c, condition_mask, c.length)
    else:
      mask = attention_mask(c, condition_mask, jnp.arange(c.length))
    x_BSD, _ = self.layers(x_BSD, rates_L, rope, mask)
    return rms_norm(x_BSD[:, c.prefix_tokens - 1 :], self.norm, c.norm_eps)

  def _with_targets(self, x_BSD: jax.Array, order_BT: jax.Array | None) -> jax.Array:
    """Adds to every token that predicts a code the embedding of the code's position."""
    target_TD = self.target_embedding.astype(x_BSD.dtype)
    target = target_TD if order_BT is None else target_TD[order_BT]
    return x_BSD.at[:, self.config.prefix_tokens - 1 :].add(target)


def patch_config(config: GPTConfig, patch: int) -> GPTConfig:
  """Returns the config whose tokens are squares of patch x patch codes.

  Raises:
    UserError: they do not divide the grid.
  """
  if patch == 1:
    return config
  rows, columns = config.grid_hw
  if patch < 1 or rows % patch or columns % patch:
    raise UserError(
      f"objective.patch_phases: patches of side {patch} do not divide the grid of"
      f" {rows}x{columns} codes"
    )
  return dataclasses.replace(config, grid=(rows // patch, columns // patch))


def patches(x_BT: jax.Array, grid: Sides, patch: int) -> jax.Array:
  """Returns [B, T, ...] as [B, patches, codes of a patch, ...], in raster order."""
  rest, (rows, columns) = x_BT.shape[2:], height_width(grid)
  split = (rows // patch, patch, columns // patch, patch)
  x = x_BT.reshape(-1, *split, *rest).swapaxes(2, 3)
  return x.reshape(len(x), -1, patch * patch, *rest)


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


@functools.partial(jax.jit, static_argnames="config")
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
  head_DV = head_DV.astype(x_BTD.dtype)
  return product("BTD,DV->BTV", x_BTD, head_DV, jnp.float32)
