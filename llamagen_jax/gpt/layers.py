"""A Llama block: the maths as free functions, the parameters as two modules.

Axes: B batch, T tokens, S keys (cache length), D model, K kv heads, G query
heads per kv head, H head dim, F ffn.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llamagen_jax.gpt.attention import (
  attention_weights,
  cudnn_attention,
  mix,
  splash_attention,
)
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.rope import apply_rope
from llamagen_jax.parallel.mesh import constrain

INIT = nn.initializers.normal(stddev=0.02)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(
  equation: str, x: jax.Array, matrix: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
  """Multiplies activations with weights; both products of the gradient suit a CPU.

  XLA's CPU kernels take transposed matrices as they are, but copy the transposes that
  JAX derives for an einsum of more axes (GPT-B's train step: 9.4 instead of 8.0 s,
  jaxlib 0.10.2). Other backends get what JAX derives.

  Args:
    equation: of an einsum that sums over the last axes of x, the first of the matrix.
    x: [B, T, ...].
    matrix: of the same dtype.
    dtype: of the product; None = the same, too.
  """
  return jnp.einsum(equation, x, matrix, preferred_element_type=dtype)


def _product_forward(equation, x, matrix, dtype):
  # The einsum itself, because rematerialisation that keeps products looks for them.
  y = jnp.einsum(equation, x, matrix, preferred_element_type=dtype)
  return y, (x, matrix)


def _product_backward(equation, dtype, operands, gradient):
  def derived(x, matrix, gradient):
    einsum = functools.partial(jnp.einsum, equation, preferred_element_type=dtype)
    return jax.vjp(einsum, x, matrix)[1](gradient)

  def of_matrices(x, matrix, gradient):
    tokens = x.shape[0] * x.shape[1]
    x_MK, gradient_MN = x.reshape(tokens, -1), gradient.reshape(tokens, -1)
    matrix_KN = matrix.reshape(x_MK.shape[1], -1)
    of_x = jnp.einsum("MN,KN->MK", gradient_MN, matrix_KN)
    of_matrix = jnp.einsum("MK,MN->KN", x_MK, gradient_MN)
    return (
      of_x.reshape(x.shape).astype(x.dtype),
      of_matrix.reshape(matrix.shape).astype(matrix.dtype),
    )

  return jax.lax.platform_dependent(
    *operands, gradient, cpu=of_matrices, default=derived
  )


product.defvjp(_product_forward, _product_backward)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """RMSNorm (arXiv 1910.07467): float32 inside, then cast, then scaled."""
  x = x_BTD.astype(jnp.float32)
  normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return normed.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


def drop_path(x_BTD: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
  """Stochastic depth (arXiv 1603.09382): drops a sample's whole branch."""
  keep_B = jax.random.bernoulli(key, 1.0 - rate, (x_BTD.shape[0],))
  return x_BTD * (keep_B / (1.0 - rate)).astype(x_BTD.dtype)[:, None, None]


class Attention(nn.Module):
  """Grouped-query self-attention without biases.

  The projection keeps a kv head together with its G query heads, its key and
  its value ([D, K, G + 2, H]): one matmul, and tensor parallelism cuts along K.
  `mask` is what the config's kind of attention takes.
  """

  config: GPTConfig
  training: bool = False

  @nn.compact
  def __call__(self, x_BTD, rope, mask):
    c = self.config
    K, G, H = c.num_kv_heads, c.heads // c.num_kv_heads, c.head_dim
    qkv_init = nn.with_logical_partitioning(INIT, ("embed", "kv_heads", None, None))
    out_init = nn.with_logical_partitioning(INIT, ("kv_heads", None, None, "embed"))
    qkv_DKCH = self.param("qkv", qkv_init, (c.dim, K, G + 2, H))
    out_KGHD = self.param("out", out_init, (K, G, H, c.dim))

    qkv_BTKCH = product("BTD,DKCH->BTKCH", x_BTD, qkv_DKCH.astype(x_BTD.dtype))
    B, T = x_BTD.shape[:2]
    q_BTNH = qkv_BTKCH[..., :G, :].reshape(B, T, K * G, H)
    k_BTKH = qkv_BTKCH[..., G, :]
    if c.qk_norm:
      q_BTNH, k_BTKH = self._norm("q_norm", q_BTNH), self._norm("k_norm", k_BTKH)
    q_BTKGH = apply_rope(q_BTNH, *rope).reshape(B, T, K, G, H)
    k_BTKH, v_BTKH = apply_rope(k_BTKH, *rope), qkv_BTKCH[..., G + 1, :]
    if c.attention == "splash":
      mixed_BTKGH = splash_attention(q_BTKGH, k_BTKH, v_BTKH, mask)
    elif c.attention == "cudnn":
      mixed_BTKGH = cudnn_attention(q_BTKGH, k_BTKH, v_BTKH, mask)
    else:
      weights_BKRS = attention_weights(q_BTKGH, k_BTKH, mask)
      drop = nn.Dropout(c.attention_dropout, deterministic=not self.training)
      mixed_BTKGH = mix(drop(weights_BKRS).astype(x_BTD.dtype), v_BTKH)
    return product("BTKGH,KGHD->BTD", mixed_BTKGH, out_KGHD.astype(x_BTD.dtype))

  def _norm(self, name, x):
    """RMSNorm of every head, one scale for all of them (arXiv 2302.05442)."""
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale_H = self.param(name, init, (self.config.head_dim,))
    return rms_norm(x, scale_H, self.config.norm_eps)


class SwiGLU(nn.Module):
  """w2(silu(w1 x) * w3 x) (arXiv 2002.05202); w1 and w3 are one parameter."""

  config: GPTConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    in_init = nn.with_logical_partitioning(INIT, ("embed", None, "ffn"))
    out_init = nn.with_logical_partitioning(INIT, ("ffn", "embed"))
    in_D2F = self.param("in", in_init, (c.dim, 2, c.ffn_dim)).astype(x_BTD.dtype)
    out_FD = self.param("out", out_init, (c.ffn_dim, c.dim)).astype(x_BTD.dtype)
    gate_up = product("BTD,DCF->BTCF", x_BTD, in_D2F)
    hidden_BTF = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
    return product("BTF,FD->BTD", hidden_BTF, out_FD)


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)); the body of a scan."""

  config: GPTConfig
  training: bool = False

  @nn.compact
  def __call__(self, x_BTD, drop_path_rate, rope, mask) -> tuple[jax.Array, None]:
    c = self.config
    attention = Attention(c, self.training, name="attention")
    mixed = attention(self._norm("attention_norm", x_BTD), rope, mask)
    x_BTD = x_BTD + self._branch(mixed, drop_path_rate)
    hidden = SwiGLU(c, name="ffn")(self._norm("ffn_norm", x_BTD))
    x_BTD = x_BTD + self._branch(hidden, drop_path_rate)
    return constrain(x_BTD, "batch", None, None), None

  def _norm(self, name, x_BTD):
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    scale_D = self.param(name, init, (self.config.dim,))
    return rms_norm(x_BTD, scale_D, self.config.norm_eps)

  def _branch(self, x_BTD, drop_path_rate):
    if not self.training:
      return x_BTD
    x_BTD = nn.Dropout(self.config.residual_dropout, deterministic=False)(x_BTD)
    if self.config.drop_path:
      x_BTD = drop_path(x_BTD, drop_path_rate, self.make_rng("dropout"))
    return x_BTD
