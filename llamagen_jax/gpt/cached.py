"""The transformer with a KV cache: what decoding runs.

A step of decoding reads every weight once to multiply it with a handful of rows,
so its time is the time to read memory. Everything here is laid out for that: the
weights are matrices [out, in], one array a layer; keys and values lie with their
positions last, which is how both products of attention read them fastest; and a
cache is only as long as what has been written to it, about.

Axes: B batch, T tokens, S cache length, D model, K kv heads, G query heads per
kv head, C = G + 2 (queries, key, value), H head dim, M = K C H, N = K G H, F ffn,
V vocabulary.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.layers import rms_norm
from llamagen_jax.gpt.rope import apply_rope, rope_table
from llamagen_jax.parallel.mesh import on_every_part


class LayerCache(NamedTuple):
  """Keys and values of one layer."""

  keys: jax.Array  # [B, K, H, S]
  values: jax.Array  # [B, K, H, S]


Cache = tuple[LayerCache, ...]


def decoding_params(config: GPTConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Trained parameters in the form that decoding reads.

  Matrices are [out, in] in the compute dtype, `layers` is a tuple of per-layer
  trees, and the norms stay float32. Leaves what is in this form already alone.
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


def init_cache(config: GPTConfig, batch: int, length: int) -> Cache:
  """An empty cache for the positions 0 .. `length` - 1."""
  c = config
  empty = jnp.zeros((batch, c.num_kv_heads, c.head_dim, length), c.dtype)
  return tuple(LayerCache(empty, empty) for _ in range(c.layers))


def grow_cache(cache: Cache, length: int) -> Cache:
  """The same cache with room for `length` positions."""
  more = length - cache_length(cache)
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, more)]), cache)


def cache_length(cache: Cache) -> int:
  return cache[0].keys.shape[-1]


def cached_forward(
  config: GPTConfig,
  params: dict[str, Any],
  x_BTD: jax.Array,
  cache: Cache,
  position: jax.Array | int,
  mask_BTS: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs T embedded tokens at `position` .. `position` + T - 1.

  Args:
    config: shape of the model.
    params: from `decoding_params`.
    x_BTD: embedded tokens, condition or codes.
    cache: from `init_cache` or the step before.
    position: of the first token.
    mask_BTS: bool [B or 1, T, S], which cache entries a token sees.

  Returns:
    float32 logits [B, V] after the last of the tokens, and the new cache.
  """
  new_cache = list(cache)

  def attend(layer: int, q_BTKGH, k_BTKH, v_BTKH):
    old = pin_layout(cache[layer])
    token = as_cache(k_BTKH, v_BTKH)
    new = write_cache(old, token, position)
    new_cache[layer] = pin_layout(new)
    if q_BTKGH.shape[1] > 1:
      return _attend(q_BTKGH, new, mask_BTS)

    def read_old():
      before_BTS = mask_BTS & (jnp.arange(mask_BTS.shape[-1]) != position)
      itself_111 = jnp.ones((1, 1, 1), bool)
      return attend_single_token(q_BTKGH, [(old, before_BTS), (token, itself_111)])

    def read_new():
      return attend_single_token(q_BTKGH, [(new, mask_BTS)])

    # A TPU would fetch all of a cache to write to it, and take it back, were it read
    # after that; a CPU would copy it, were it read before.
    return jax.lax.platform_dependent(tpu=read_old, default=read_new)

  at_T = jnp.asarray(position) + jnp.arange(x_BTD.shape[1])
  return decode_forward(config, params, x_BTD, at_T, attend), tuple(new_cache)


def decode_forward(
  config: GPTConfig,
  params: dict[str, Any],
  x_BTD: jax.Array,
  position: jax.Array,
  attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Runs embedded tokens [B, T, D] at `position`, [T] or [B, T].

  What a token attends to is the caller's: `attend(layer, q_BTKGH, k_BTKH, v_BTKH)`
  gives the numerator values [B, T, K, G, H] of a layer.

  Returns:
    float32 logits [B, V] after the last of the tokens.
  """
  rope = tuple(jnp.asarray(table)[position] for table in rope_table(config))
  for i, layer in enumerate(params["layers"]):
    normed = rms_norm(x_BTD, layer["attention_norm"], config.norm_eps)
    mixed_BTKGH = attend(i, *_project(config, layer, normed, rope))
    mixed_BTN = mixed_BTKGH.reshape(*x_BTD.shape[:2], -1)
    out_DBT = jnp.einsum("DN,BTN->DBT", layer["out_DN"], mixed_BTN)
    x_BTD = x_BTD + out_DBT.transpose(1, 2, 0)
    normed = rms_norm(x_BTD, layer["ffn_norm"], config.norm_eps)
    x_BTD = x_BTD + _ffn(layer, normed)
  last_BD = rms_norm(x_BTD[:, -1], params["norm"], config.norm_eps)
  logits_VB = jnp.einsum(
    "VD,BD->VB", params["head"], last_BD, preferred_element_type=jnp.float32
  )
  # Without the barrier the compiler turns the product around, which is slower.
  return jax.lax.optimization_barrier(logits_VB).T


def pin_layout(cache: LayerCache) -> LayerCache:
  """Keeps positions in a TPU's lanes, where a loop carries a cache.

  Left to itself the compiler puts the batch there, because that makes the writes
  cheapest: every cache is then copied before and after the loop, and padded to
  128 rows in between.
  """

  def pin_part(x):
    layout = Layout((0, 1, 2, 3))
    return jax.lax.platform_dependent(
      x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )

  def pin(x):
    return on_every_part(pin_part, x, "batch", "kv_heads", None, None)

  return jax.tree.map(pin, cache)


def _project(c, layer, x_BTD, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries [B, T, K, G, H] and keys, normed and turned, and values [B, T, K, H]."""
  K, C, H = c.num_kv_heads, c.heads // c.num_kv_heads + 2, c.head_dim
  B, T = x_BTD.shape[:2]
  qkv_MBT = jnp.einsum("MD,BTD->MBT", layer["qkv_MD"], x_BTD)
  qkv_BTKCH = qkv_MBT.transpose(1, 2, 0).reshape(B, T, K, C, H)
  if "q_norm" in layer:
    q_BTKGH = rms_norm(qkv_BTKCH[..., :-2, :], layer["q_norm"], c.norm_eps)
    k_BTK1H = rms_norm(qkv_BTKCH[..., -2:-1, :], layer["k_norm"], c.norm_eps)
    qkv_BTKCH = jnp.concatenate([q_BTKGH, k_BTK1H, qkv_BTKCH[..., -1:, :]], axis=3)
  turned = apply_rope(qkv_BTKCH[..., :-1, :].reshape(B, T, -1, H), *rope)
  turned_BTKCH = turned.reshape(B, T, K, C - 1, H)
  return turned_BTKCH[..., :-1, :], turned_BTKCH[..., -1, :], qkv_BTKCH[..., -1, :]


def _ffn(layer, x_BTD):
  gate_up = jnp.einsum("CFD,BTD->CFBT", layer["in_2FD"], x_BTD)
  hidden_FBT = jax.nn.silu(gate_up[0]) * gate_up[1]
  return jnp.einsum("DF,FBT->DBT", layer["out_DF"], hidden_FBT).transpose(1, 2, 0)


def as_cache(k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
  """Keys and values of T tokens, laid out as a cache of length T."""
  return LayerCache(k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 3, 1))


def write_cache(
  old: LayerCache, new: LayerCache, position: jax.Array | int
) -> LayerCache:
  """Writes from `position` on, in place where the caller lets go of `old`."""

  def put(old, new):
    start = (0, 0, 0, position)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

  return jax.tree.map(put, old, new)


def _attend(q_BTKGH, cache: LayerCache, mask_BTS):
  """Attention of several tokens over the cache, two matmuls: the prefill."""
  scores_BKGTS = jnp.einsum(
    "BTKGH,BKHS->BKGTS", q_BTKGH, cache.keys, preferred_element_type=jnp.float32
  )
  weights = _softmax(scores_BKGTS, mask_BTS[:, None, None], q_BTKGH)
  return jnp.einsum("BKGTS,BKHS->BTKGH", weights, cache.values)


def attend_single_token(
  q_B1KGH: jax.Array, parts: Sequence[tuple[LayerCache, jax.Array]]
) -> jax.Array:
  """Attention of one token over the parts of a cache, each with its mask [B, 1, S].

  Query heads of a group go one by one, because a group axis of size 1 in the product
  costs a CPU a factor of 20.

  Returns:
    [B, 1, K, G, H].
  """

  def attend(q_BKH):
    q_BKH = q_BKH * q_BKH.shape[-1] ** -0.5
    return _merge([_attend_part(q_BKH, *part) for part in parts])

  groups = range(q_B1KGH.shape[3])
  mixed_BKGH = jnp.stack([attend(q_B1KGH[:, 0, :, g]) for g in groups], axis=2)
  return mixed_BKGH[:, None].astype(q_B1KGH.dtype)


class SoftmaxPartial(NamedTuple):
  """Attention over a part of the keys, before it is normalised."""

  max: jax.Array  # score, [B, K, 1]
  denominator: jax.Array  # of exp(score - max), [B, K, 1]
  numerator: jax.Array  # values, weighted by the same, [B, K, H]


def _attend_part(q_BKH, cache: LayerCache, mask_B1S) -> SoftmaxPartial:
  f32 = {"preferred_element_type": jnp.float32}
  scores_BKS = jnp.einsum("BKH,BKHS->BKS", q_BKH, cache.keys, **f32)
  scores_BKS = jnp.where(mask_B1S, scores_BKS, jnp.finfo(jnp.float32).min)
  highest_BK1 = jnp.max(scores_BKS, axis=-1, keepdims=True)
  weights_BKS = jnp.where(mask_B1S, jnp.exp(scores_BKS - highest_BK1), 0.0)
  total_BK1 = jnp.sum(weights_BKS, axis=-1, keepdims=True)
  weights_BKS = weights_BKS.astype(cache.values.dtype)
  mixed_BKH = jnp.einsum("BKS,BKHS->BKH", weights_BKS, cache.values, **f32)
  return SoftmaxPartial(highest_BK1, total_BK1, mixed_BKH)


def _merge(parts: Sequence[SoftmaxPartial]) -> jax.Array:
  """Parts -> the numerator values [B, K, H] (arXiv 2205.14135, section 3.1)."""
  if len(parts) == 1:
    return parts[0].numerator / parts[0].denominator
  highest_BK1 = functools.reduce(jnp.maximum, [part.max for part in parts])
  scales = [jnp.exp(part.max - highest_BK1) for part in parts]
  total_BK1 = sum(k * part.denominator for k, part in zip(scales, parts, strict=True))
  mixed_BKH = sum(k * part.numerator for k, part in zip(scales, parts, strict=True))
  return mixed_BKH / total_BK1


def _softmax(scores, mask, q):
  scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores, axis=-1).astype(q.dtype)
