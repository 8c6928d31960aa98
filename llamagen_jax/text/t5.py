"""The encoder of T5 v1.1 and flan-T5 (arXiv 1910.10683, 2210.11416) in Flax.

Axes: B batch, T tokens, D model, N heads, H head dim, F ffn, L layers.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import constrain

# name: (layers, dim, heads, ffn_dim) of T5 v1.1's and flan-T5's encoders.
PRESETS = {
  "small": (8, 512, 6, 1024),
  "base": (12, 768, 12, 2048),
  "large": (24, 1024, 16, 2816),
  "xl": (24, 2048, 32, 5120),
  "xxl": (24, 4096, 64, 10240),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape of an encoder; the names of Hugging Face's config.json are in brackets."""

  vocab_size: int
  dim: int  # [d_model]
  layers: int  # [num_layers]
  heads: int  # [num_heads]
  head_dim: int  # [d_kv]; heads * head_dim need not be dim
  ffn_dim: int  # [d_ff]
  buckets: int = 32  # [relative_attention_num_buckets]
  max_distance: int = 128  # [relative_attention_max_distance]
  norm_eps: float = 1e-6  # [layer_norm_epsilon]
  dtype: str = "float32"  # of weights, activations and matmul inputs

  def __post_init__(self):
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"T5 dtype {self.dtype!r}: expected float32 or bfloat16")

  @classmethod
  def preset(cls, name: str, dtype: str) -> "T5Config":
    """Returns the shape of a published size."""
    layers, dim, heads, ffn_dim = PRESETS[name]
    return cls(32128, dim, layers, heads, head_dim=64, ffn_dim=ffn_dim, dtype=dtype)


def relative_buckets(config: T5Config, tokens: int) -> np.ndarray:
  """Returns the bucket of every (query, key) pair, int32 [T, T].

  Half of the buckets are for keys behind the query. In either half the first
  distances have a bucket each, and the others up to `max_distance` share the
  rest on a logarithmic scale (arXiv 1910.10683, sec. 2.1).
  """
  half = config.buckets // 2
  exact = half // 2
  offset = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
  distance = np.abs(offset)
  # In float32, as it was trained: distances on a bucket's edge depend on it.
  scale = np.float32(np.log(config.max_distance / exact))
  far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  far = exact + (far / scale * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (bucket + half * (offset > 0)).astype(np.int32)


def t5_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """Returns x by its root mean square, scaled; float32 inside."""
  x = x_BTD.astype(jnp.float32)
  normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return (normed * scale_D.astype(jnp.float32)).astype(x_BTD.dtype)


class T5Block(nn.Module):
  """x + attention(norm(x)), then x + gated-GELU(norm(x)); no biases, no scaling."""

  config: T5Config

  @nn.compact
  def __call__(self, x_BTD, bias_BNTT):
    x_BTD = x_BTD + self._attention(self._norm("attention_norm", x_BTD), bias_BNTT)
    x_BTD = x_BTD + self._ffn(self._norm("ffn_norm", x_BTD))
    return constrain(x_BTD, "batch", None, None), None

  def _attention(self, x_BTD, bias_BNTT):
    c = self.config
    qkv_D3NH = self._weight(
      "qkv", (c.dim, 3, c.heads, c.head_dim), ("embed", None, "kv_heads", None)
    )
    out_NHD = self._weight(
      "out", (c.heads, c.head_dim, c.dim), ("kv_heads", None, "embed")
    )
    q_BTNH, k_BTNH, v_BTNH = jnp.moveaxis(
      jnp.einsum("BTD,DCNH->BTCNH", x_BTD, qkv_D3NH), 2, 0
    )
    scores_BNTS = bias_BNTT + jnp.einsum(
      "BTNH,BSNH->BNTS", q_BTNH, k_BTNH, preferred_element_type=jnp.float32
    )
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(x_BTD.dtype)
    mixed_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)
    return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, out_NHD)

  def _ffn(self, x_BTD):
    c = self.config
    in_D2F = self._weight("in", (c.dim, 2, c.ffn_dim), ("embed", None, "ffn"))
    out_FD = self._weight("ffn_out", (c.ffn_dim, c.dim), ("ffn", "embed"))
    gate_BTF, up_BTF = jnp.moveaxis(jnp.einsum("BTD,DCF->BTCF", x_BTD, in_D2F), 2, 0)
    hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
    return jnp.einsum("BTF,FD->BTD", hidden_BTF, out_FD)

  def _norm(self, name, x_BTD):
    scale_D = self._weight(name, (self.config.dim,), (None,), nn.initializers.ones)
    return t5_norm(x_BTD, scale_D, self.config.norm_eps)

  def _weight(self, name, shape, axes, init=None):
    init = init or nn.initializers.lecun_normal(in_axis=_inputs(name), out_axis=-1)
    return self.param(
      name, nn.with_logical_partitioning(init, axes), shape, self.config.dtype
    )


class T5Encoder(nn.Module):
  """Token ids in, features out. Parameters are stacked over layers."""

  config: T5Config

  @nn.compact
  def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Encodes captions that are padded on the right.

    Args:
      ids_BT: int32 token ids.
      mask_BT: 1 on tokens, 0 on padding.

    Returns:
      [B, T, D] in `config.dtype`; the rows of padding mean nothing.
    """
    c = self.config
    table_VD = self._param(
      "embedding", (c.vocab_size, c.dim), ("vocab", "embed"), nn.initializers.normal(1)
    )
    bias_KN = self._param(
      "position_bias",
      (c.buckets, c.heads),
      (None, "kv_heads"),
      nn.initializers.normal(c.dim**-0.5),
    )
    x_BTD = jnp.take(table_VD, ids_BT, axis=0, mode="fill")
    x_BTD = constrain(x_BTD, "batch", None, None)
    buckets_TT = relative_buckets(c, ids_BT.shape[1])
    bias_NTT = jnp.moveaxis(bias_KN[buckets_TT].astype(jnp.float32), 2, 0)
    hidden = jnp.finfo(jnp.float32).min
    bias_BNTT = jnp.where(mask_BT[:, None, None] > 0, bias_NTT, hidden)
    layers = nn.scan(
      T5Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, name="layers")
    x_BTD, _ = layers(x_BTD, bias_BNTT)
    norm_D = self._param("norm", (c.dim,), (None,), nn.initializers.ones)
    return t5_norm(x_BTD, norm_D, c.norm_eps)

  def _param(self, name, shape, axes, init):
    return self.param(
      name, nn.with_logical_partitioning(init, axes), shape, self.config.dtype
    )


def _inputs(name: str) -> tuple[int, ...]:
  """Returns the axes that a weight sums over, which scale its random values."""
  return (0, 1) if name == "out" else (0,)


@functools.partial(jax.jit, static_argnames="config")
def init_t5(config: T5Config, key: jax.Array) -> Any:
  """Returns random parameters, boxed with the names of their axes."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return T5Encoder(config).init(key, tokens, tokens)["params"]


@functools.partial(jax.jit, static_argnums=0)
def encode(
  config: T5Config, params: Any, ids_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """Returns features [B, T, D] of captions padded on the right; see `T5Encoder`."""
  return T5Encoder(config).apply({"params": params}, ids_BT, mask_BT)


def left_pad(features_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Moves the features of every caption to the end, with zeros before them.

  The transformer that makes the image sees the last token of a caption right
  before the first code.
  """
  tokens = mask_BT.shape[1]
  length_B1 = jnp.sum(mask_BT > 0, axis=1, keepdims=True)
  source_BT = jnp.arange(tokens) - (tokens - length_B1)
  moved = jnp.take_along_axis(features_BTD, jnp.maximum(source_BT, 0)[..., None], 1)
  return jnp.where(source_BT[..., None] >= 0, moved, 0)


@functools.partial(jax.jit, static_argnums=0)
def padded_features(
  config: Any, params: Any, ids_BP: jax.Array, mask_BP: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns features [B, P, C] and mask padded left, of tokens padded right."""
  features_BPC = left_pad(encode(config, params, ids_BP, mask_BP), mask_BP)
  return features_BPC, jnp.flip(mask_BP, axis=1)
