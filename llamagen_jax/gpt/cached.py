"""The transformer with a KV cache: what decoding runs.

A step of decoding reads every weight once to multiply it with a handful of rows,
so its time is the time to read memory. Everything here is laid out for that: the
weights are matrices [out, in], one array a layer, and a cache is only as long as
what has been written to it, about.

Axes: B batch, T tokens, S cache length, D model, K kv heads, G query heads per
kv head, C = G + 2 (queries, key, value), H head dim, M = K C H, N = K G H, F ffn,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import (
  Cache,
  as_cache,
  as_code_cache,
  pin_layout,
  write_condition,
)
from llamagen_jax.gpt.cached_attention import attend_prefill, write_and_attend
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.layers import rms_norm
from llamagen_jax.gpt.quantized import matmul
from llamagen_jax.gpt.rope import apply_rope, rope_in_order, rope_table

# (q_BTKGH, k_BTKH, v_BTKH, cache of the layer) -> (mixed_BTKGH, its new cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def decoding_params(config: GPTConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Returns trained parameters in the form that decoding reads.

  Matrices are [out, in] in the compute dtype, `layers` is a tuple of per-layer
  trees, and the norms stay float32. Parameters in this form already are returned
  as they are.
  """
  if isinstance(params["layers"], tuple):
    return params

  def matrix(x, *order):
    return jnp.transpose(x, order).astype(config.dtype)

  stack = params["layers"]

  def head_norms(i):
    names = ("q_norm", "k_norm") if config.qk_norm else ()
    return {name: stack["attention"][name][i] for name in names}

  layers = tuple(
    head_norms(i)
    | {
      "attention_norm": stack["attention_norm"][i],
      "qkv_MD": matrix(stack["attention"]["qkv"][i].reshape(config.dim, -1), 1, 0),
      "out_DN": matrix(stack["attention"]["out"][i].reshape(-1, config.dim), 1, 0),
      "ffn_norm": stack["ffn_norm"][i],
      "in_2FD": matrix(stack["ffn"]["in"][i], 1, 2, 0),
      "out_DF": matrix(stack["ffn"]["out"][i], 1, 0),
    }
    for i in range(config.layers)
  )
  return params | {
    "code_embedding": params["code_embedding"].astype(config.dtype),
    "head": matrix(params["head"], 1, 0),
    "layers": layers,
  }


def prefill_forward(
  config: GPTConfig,
  params: dict[str, Any],
  x_BTD: jax.Array,
  cache: Cache,
  mask_BTS: jax.Array,
  *,
  order_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Runs the first T <= P embedded condition tokens, at the positions 0 .. T - 1.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    x_BTD: embedded tokens.
    cache: empty, from `init_cache`.
    mask_BTS: bool [B or 1, T, S], the cache entries that a token sees.
    order_BT: as of `run_layers`.

  Returns:
    float32 logits [B, V] after the last of the tokens, and the cache.
  """

  def attend(q_BTKGH, k_BTKH, v_BTKH, old):
    new = write_condition(pin_layout(old), as_cache(k_BTKH, v_BTKH))
    return attend_prefill(q_BTKGH, new, mask_BTS), pin_layout(new)

  at_T = jnp.arange(x_BTD.shape[1])
  x_BTD, cache = run_layers(
    config, params, x_BTD, at_T, cache, attend, order_BT=order_BT
  )
  return to_logits(config, params, x_BTD[:, -1]), cache


def step_forward(
  config: GPTConfig,
  params: dict[str, Any],
  x_B1D: jax.Array,
  cache: Cache,
  position: jax.Array,
  mask_B1S: jax.Array,
  *,
  order_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Runs one embedded code a row, all of them at the same position.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    x_B1D: embedded tokens.
    cache: of the positions before.
    position: of the tokens, an integer scalar.
    mask_B1S: bool [B or 1, 1, S], the cache entries that a token sees, itself
      included.
    order_BT: as of `run_layers`.

  Returns:
    float32 logits [B, V] of the codes that follow, and the new cache.
  """

  def attend(q_B1KGH, k_B1KH, v_B1KH, old):
    token = as_code_cache(config, k_B1KH, v_B1KH)
    return write_and_attend(q_B1KGH, token, old, position, mask_B1S)

  at_1 = jnp.asarray(position)[None]
  x_B1D, cache = run_layers(
    config, params, x_B1D, at_1, cache, attend, order_BT=order_BT
  )
  return to_logits(config, params, x_B1D[:, 0]), cache


def run_layers(
  config: GPTConfig,
  params: dict[str, Any],
  x_BTD: jax.Array,
  position: jax.Array,
  cache: Cache,
  attend: Attend,
  *,
  order_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Runs embedded tokens through all layers, with attention by the caller.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    x_BTD: embedded tokens.
    position: of the tokens, [T], or [B, T] where every row has its own.
    cache: one entry a layer, in the form that `attend` takes and returns.
    attend: writes the tokens of a layer to its cache and attends from them.
    order_BT: the codes' positions in the order that the model predicts them in, for
      one that was trained in random orders; None = raster order.

  Returns:
    Hidden states [B, T, D] and the new cache.
  """
  if order_BT is None:
    rope = tuple(jnp.asarray(table)[position] for table in rope_table(config))
  else:
    at_BT = jnp.broadcast_to(position, x_BTD.shape[:2])
    rope = tuple(
      jnp.take_along_axis(table_BSF, at_BT[..., None], axis=1)
      for table_BSF in rope_in_order(config, order_BT)
    )
  if config.target_embedding:
    target_TD = params["target_embedding"]
    x_BTD = x_BTD + _target(config, target_TD, position, order_BT)
  new_cache = []
  for layer, layer_cache in zip(params["layers"], cache, strict=True):
    normed = rms_norm(x_BTD, layer["attention_norm"], config.norm_eps)
    q_BTKGH, k_BTKH, v_BTKH = _project(config, layer, normed, rope)
    mixed_BTKGH, layer_cache = attend(q_BTKGH, k_BTKH, v_BTKH, layer_cache)
    new_cache.append(layer_cache)
    mixed_BTN = mixed_BTKGH.reshape(*x_BTD.shape[:2], -1)
    out_DBT = matmul("DN,BTN->DBT", layer["out_DN"], mixed_BTN)
    x_BTD = x_BTD + out_DBT.transpose(1, 2, 0)
    normed = rms_norm(x_BTD, layer["ffn_norm"], config.norm_eps)
    x_BTD = x_BTD + _ffn(layer, normed)
  return x_BTD, tuple(new_cache)


def _target(
  config: GPTConfig,
  target_TD: jax.Array,
  position: jax.Array,
  order_BT: jax.Array | None,
) -> jax.Array:
  """Returns the embeddings of the codes that the tokens at `position` predict.

  Zero for the tokens of a condition that predict none.
  """
  index = position - (config.prefix_tokens - 1)
  code = jnp.clip(index, 0, config.image_tokens - 1)
  if order_BT is not None:
    code = jnp.take_along_axis(order_BT, jnp.atleast_2d(code), axis=1)
  return jnp.where((index >= 0)[..., None], target_TD[code], 0.0).astype(config.dtype)


def to_logits(config: GPTConfig, params: dict[str, Any], x_BD: jax.Array) -> jax.Array:
  """Returns float32 logits [B, V] of hidden states [B, D]."""
  normed_BD = rms_norm(x_BD, params["norm"], config.norm_eps)
  logits_VB = matmul("VD,BD->VB", params["head"], normed_BD, jnp.float32)
  # Without the barrier the compiler turns the product around, which is slower.
  return jax.lax.optimization_barrier(logits_VB).T


def _project(c, layer, x_BTD, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries [B, T, K, G, H] and keys, normed and turned, and values."""
  K, C, H = c.num_kv_heads, c.heads // c.num_kv_heads + 2, c.head_dim
  B, T = x_BTD.shape[:2]
  qkv_MBT = matmul("MD,BTD->MBT", layer["qkv_MD"], x_BTD)
  qkv_BTKCH = qkv_MBT.transpose(1, 2, 0).reshape(B, T, K, C, H)
  if "q_norm" in layer:
    q_BTKGH = rms_norm(qkv_BTKCH[..., :-2, :], layer["q_norm"], c.norm_eps)
    k_BTK1H = rms_norm(qkv_BTKCH[..., -2:-1, :], layer["k_norm"], c.norm_eps)
    qkv_BTKCH = jnp.concatenate([q_BTKGH, k_BTK1H, qkv_BTKCH[..., -1:, :]], axis=3)
  turned = apply_rope(qkv_BTKCH[..., :-1, :].reshape(B, T, -1, H), *rope)
  turned_BTKCH = turned.reshape(B, T, K, C - 1, H)
  return turned_BTKCH[..., :-1, :], turned_BTKCH[..., -1, :], qkv_BTKCH[..., -1, :]


def _ffn(layer, x_BTD):
  gate_up = matmul("CFD,BTD->CFBT", layer["in_2FD"], x_BTD)
  hidden_FBT = jax.nn.silu(gate_up[0]) * gate_up[1]
  return matmul("DF,FBT->DBT", layer["out_DF"], hidden_FBT).transpose(1, 2, 0)
