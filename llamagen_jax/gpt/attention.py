"""Attention of whole sequences, as training runs it: by XLA, or by a kernel.

Axes: B batch, T tokens, S keys, K kv heads, G query heads per kv head, H head dim,
R = G T rows of a kv head.
"""

import functools
import math
from typing import Literal

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
import jax.numpy as jnp

from llamagen_jax.parallel.mesh import spec

HEAD_MULTIPLE = 8  # of cuDNN
LANES = 128  # the kernel cuts sequences into blocks of a multiple of this


def attention_weights(
  q_BTKGH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """Softmax of scaled scores, float32 [B, K, R, S]; mask True = visible."""
  B, T, K, G, H = q_BTKGH.shape
  q_BKRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  scores = jnp.einsum(
    "BKRH,BSKH->BKRS", q_BKRH, k_BSKH, preferred_element_type=jnp.float32
  )
  scores = (H**-0.5 * scores).reshape(B, K, G, T, -1)
  scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores, axis=-1).reshape(B, K, G * T, -1)


def mix(weights_BKRS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """The values of every query's keys, weighted: [B, T, K, G, H]."""
  B, K, R, T = weights_BKRS.shape  # a token is a query and a key
  mixed_BKRH = jnp.einsum("BKRS,BSKH->BKRH", weights_BKRS, v_BSKH)
  return mixed_BKRH.reshape(B, K, R // T, T, -1).transpose(0, 3, 1, 2, 4)


def splash_attention(
  q_BTKGH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  visible_BT: jax.Array | None = None,
) -> jax.Array:
  """Causal attention by the TPU's splash kernel, which keeps no [T, T] array.

  On other backends the kernel is interpreted, for tests. Sequences are padded at
  their end to whole blocks, where causality hides the padding.

  Args:
    q_BTKGH: queries; k_BTKH, v_BTKH: keys and values of the same sequence.
    visible_BT: False on tokens that the others do not see and that see none of
      the others; None = all are seen.

  Returns:
    [B, T, K, G, H]. Rows of invisible tokens are of no use.
  """
  B, T, K, G, H = q_BTKGH.shape
  padding = -T % LANES

  def heads_first(x_BTNH):
    padded = jnp.pad(x_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0)))
    return padded.swapaxes(1, 2)

  q_BNTH = heads_first((H**-0.5 * q_BTKGH).reshape(B, T, K * G, H))
  segments_BT = None
  if visible_BT is not None:
    segments_BT = jnp.pad(visible_BT.astype(jnp.int32), ((0, 0), (0, padding)))
  operands = (q_BNTH, heads_first(k_BTKH), heads_first(v_BTKH), segments_BT)
  mixed_BNTH = _on_mesh(_splash, operands)
  return mixed_BNTH[:, :, :T].swapaxes(1, 2).reshape(B, T, K, G, H)


def cudnn_attention(
  q_BTKGH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  visible_BT: jax.Array | None = None,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Causal attention by cuDNN, which keeps no [T, T] array of scores; on GPUs alone.

  cuDNN takes heads of a multiple of 8 and, with a mask, even lengths: heads are padded
  with zeros, which change no product, and sequences at their end, where causality hides
  the padding.

  Args:
    q_BTKGH: queries, bfloat16 or float16.
    k_BTKH: keys of the same sequence.
    v_BTKH: values.
    visible_BT: as of `splash_attention`.
    implementation: of `jax.nn.dot_product_attention`; tests compare it with XLA's.

  Returns:
    [B, T, K, G, H].
  """
  B, T, K, G, H = q_BTKGH.shape
  length = (0, 0) if visible_BT is None else (0, T % 2)

  def padded(x_BTNH):
    return jnp.pad(x_BTNH, ((0, 0), length, (0, 0), (0, -H % HEAD_MULTIPLE)))

  mask_B1TS = None
  if visible_BT is not None:
    visible_BT = jnp.pad(visible_BT.astype(bool), ((0, 0), length))
    itself = jnp.eye(visible_BT.shape[1], dtype=bool)
    mask_B1TS = (visible_BT[:, None, :] | itself)[:, None]
  mixed_BTNH = jax.nn.dot_product_attention(
    padded(q_BTKGH.reshape(B, T, K * G, H)), padded(k_BTKH), padded(v_BTKH),
    mask=mask_B1TS, scale=H**-0.5, is_causal=True, implementation=implementation,
  )  # fmt: skip
  return mixed_BTNH[:, :T, :, :H].reshape(B, T, K, G, H)


def _on_mesh(attend, operands) -> jax.Array:
  """A kernel is opaque to the partitioner: every chip runs it on its own heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attend(*operands)
  k_BKTH = operands[1]
  heads = spec(mesh, k_BKTH.shape, ("batch", "kv_heads", None, None))
  rows = jax.sharding.PartitionSpec(heads[0])
  specs = (heads, heads, heads, None if operands[3] is None else rows)
  return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(
    *operands
  )


def _splash(q_BNTH, k_BKTH, v_BKTH, segments_BT):
  def attend(*operands, interpret):
    kernel = _kernel(q_BNTH.shape[1], q_BNTH.shape[2], interpret)

    def row(q_NTH, k_KTH, v_KTH, segments_T=None):
      if segments_T is None:
        return kernel(q_NTH, k_KTH, v_KTH)
      return kernel(q_NTH, k_KTH, v_KTH, splash.SegmentIds(segments_T, segments_T))

    return jax.vmap(row)(*operands)

  operands = (q_BNTH, k_BKTH, v_BKTH)
  if segments_BT is not None:
    operands = (*operands, segments_BT)
  return jax.lax.platform_dependent(
    *operands,
    tpu=functools.partial(attend, interpret=False),
    default=functools.partial(attend, interpret=True),
  )


def _kernel(heads: int, length: int, interpret: bool):
  block = LANES * math.gcd(length // LANES, 4)  # 512 where that divides
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
    block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
  return splash.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
  )
