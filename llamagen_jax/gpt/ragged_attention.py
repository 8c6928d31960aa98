"""Attention over a cache whose rows are written to different lengths: a TPU's kernel.

XLA reads the whole cache, whatever the mask hides. The kernel walks along a list of
the blocks of positions up to the last visible one of every row, and reads no others.
Scores and weights stay on the chip, and codes in 8 bits are read as they are.

Axes: B rows, K kv heads, G query heads a kv head, R = G T queries of a kv head, H head
dim, S positions of the cache, W = 128 of a block, N blocks of all rows.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llamagen_jax.gpt.cache import LayerCache
from llamagen_jax.parallel.mesh import spec

BLOCK = 128  # positions; they lie in the lanes of a TPU, which are as many
HIDDEN = float(jnp.finfo(jnp.float32).min)


def blocks_to_read(mask_B1S: jax.Array) -> jax.Array:
  """Returns the blocks up to the last visible position, int32 [B]; at least one."""
  end_S = jnp.arange(mask_B1S.shape[-1]) + 1
  length_B = jnp.max(jnp.where(mask_B1S[:, 0], end_S, 1), axis=-1)
  return pl.cdiv(length_B, BLOCK)


def list_blocks(count_B: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Lists the blocks to read, row after row.

  Args:
    count_B: blocks of every row.
    most: blocks that a row has at most.

  Returns:
    The rows and the blocks' numbers in them, int32 [B most]; the first sum(count_B)
    entries count.
  """
  end_B = jnp.cumsum(count_B)
  entry_N = jnp.arange(len(count_B) * most)
  row_N = jnp.searchsorted(end_B, entry_N, side="right", method="compare_all")
  row_N = jnp.minimum(row_N, len(count_B) - 1)
  return row_N, entry_N - (end_B - count_B)[row_N]


@functools.partial(jax.jit, static_argnames="shortest")
def attend_ragged(
  q_BKRH: jax.Array, cache: LayerCache, mask_B1S: jax.Array, shortest: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attends to the visible positions of every row.

  Positions behind the last visible one are not read, and what is hidden may be
  anything, even NaN.

  Args:
    q_BKRH: scaled queries.
    cache: in their dtype, or in 8 bits with scales.
    mask_B1S: bool, the positions that all queries of a row see.
    shortest: positions that rows are expected to see at least; only the cost that the
      kernel declares depends on it.

  Returns:
    Fields of a `SoftmaxPartial`, float32: the largest scores and the denominators,
    [B, K, R, 1], and the numerators [B, K, R, H].
  """
  mesh = jax.sharding.get_abstract_mesh()
  attend, operands = functools.partial(_attend, shortest), (q_BKRH, cache, mask_B1S)
  if mesh.empty:
    return attend(*operands)
  # A kernel is opaque to the partitioner: every chip runs it on its rows and heads.
  heads = spec(mesh, q_BKRH.shape[:2], ("batch", "kv_heads"))
  rows = jax.sharding.PartitionSpec(heads[0])
  return jax.shard_map(
    attend, in_specs=(heads, heads, rows), out_specs=heads, check_vma=False
  )(*operands)


def _attend(shortest, q_BKRH, cache, mask_B1S):
  B, K, R, H = q_BKRH.shape
  S = mask_B1S.shape[-1]
  most = pl.cdiv(S, BLOCK)
  count_B = blocks_to_read(mask_B1S)
  row_N, block_N = list_blocks(count_B, most)
  # The last block may go beyond the cache, where nothing is visible.
  mask_B1S = jnp.pad(mask_B1S.astype(jnp.int32), ((0, 0), (0, 0), (0, -S % BLOCK)))

  def of_row(*shape):
    zeros = (0,) * len(shape)
    return pl.BlockSpec((1, *shape), lambda n, row_N, block_N: (row_N[n], *zeros))

  def of_block(*shape):
    zeros = (0,) * len(shape)
    return pl.BlockSpec(
      (1, *shape, BLOCK), lambda n, row_N, block_N: (row_N[n], *zeros, block_N[n])
    )

  # Were it free to, the compiler would fetch all of a small cache ahead of the kernel.
  arrays = [
    pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in cache if x is not None
  ]
  q_BMH = q_BKRH.swapaxes(1, 2).reshape(B, R * K, H)
  result = [jax.ShapeDtypeStruct((B, R * K, n), jnp.float32) for n in (1, 1, H)]
  partial = pl.pallas_call(
    _kernel,
    out_shape=result,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(jnp.sum(count_B),),
      in_specs=[
        of_row(R * K, H), of_block(1), *(of_block(*x.shape[1:-1]) for x in arrays)
      ],
      out_specs=[of_row(R * K, n) for n in (1, 1, H)],
      scratch_shapes=[pltpu.VMEM((R * K, K * H), q_BKRH.dtype)],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    cost_estimate=_cost(q_BKRH, arrays, result, shortest),
    name="attend_ragged",
  )(row_N, block_N, q_BMH, mask_B1S, *arrays)  # fmt: skip
  return tuple(x.reshape(B, R, K, -1).swapaxes(1, 2) for x in partial)


def mean_blocks(shortest: int, end: int) -> float:
  """Returns the blocks that a row reads, on average over the lengths in a range."""
  lengths = range(shortest, end)
  return sum(max(1, pl.cdiv(n, BLOCK)) for n in lengths) / len(lengths)


def _cost(q_BKRH, arrays, result, shortest) -> pl.CostEstimate:
  """Declares the cost of a batch whose rows are spread evenly over all lengths."""
  S = arrays[0].shape[-1]
  positions = mean_blocks(shortest, S) * BLOCK
  each = sum(x.size * x.dtype.itemsize for x in (q_BKRH, *result))
  cache = sum(x.size * x.dtype.itemsize for x in arrays) / S * positions
  heads = q_BKRH.shape[1]  # every query is multiplied with the keys of all of them
  return pl.CostEstimate(
    flops=int(4 * heads * q_BKRH.size * positions),
    transcendentals=int(q_BKRH.size / q_BKRH.shape[-1] * positions),
    bytes_accessed=int(cache + each),
  )


def _kernel(row_N, block_N, q, mask, keys, values, *rest):
  """Adds a block to the partial softmax of its row, which stays on the chip.

  All heads are one product: the queries of a head are zero where other heads' keys are.
  """
  *scales, highest, denominator, numerator, spread = rest
  K, H = keys.shape[1:3]
  M = q.shape[1]  # R K, kv heads inside
  is_own_MF = (
    jax.lax.broadcasted_iota(jnp.int32, (M, K * H), 0) % K
    == jax.lax.broadcasted_iota(jnp.int32, (M, K * H), 1) // H
  )

  @pl.when(block_N[pl.program_id(0)] == 0)
  def _start():
    q_MF = jnp.concatenate([q[0]] * K, axis=1)
    spread[...] = jnp.where(is_own_MF, q_MF, 0)
    highest[...] = jnp.full(highest.shape, HIDDEN)
    denominator[...] = jnp.zeros(denominator.shape)
    numerator[...] = jnp.zeros(numerator.shape)

  visible_1W = mask[0] != 0
  f32 = {"preferred_element_type": jnp.float32}

  def as_matrix(x):
    return x[0].astype(spread.dtype).reshape(K * H, BLOCK)

  def scaled(x_MW, scale):
    return x_MW * jnp.concatenate([scale[0].astype(jnp.float32)] * (M // K))

  scores_MW = jnp.dot(spread[...], as_matrix(keys), **f32)
  if scales:
    scores_MW = scaled(scores_MW, scales[0])
  scores_MW = jnp.where(visible_1W, scores_MW, HIDDEN)
  new_M1 = jnp.maximum(highest[0], jnp.max(scores_MW, axis=-1, keepdims=True))
  weights_MW = jnp.where(visible_1W, jnp.exp(scores_MW - new_M1), 0.0)
  shrunk_M1 = jnp.exp(highest[0] - new_M1)
  sum_M1 = jnp.sum(weights_MW, axis=-1, keepdims=True)
  if scales:
    weights_MW = jnp.where(visible_1W, scaled(weights_MW, scales[1]), 0.0)
  # Zero times a hidden NaN were NaN.
  values_FW = jnp.where(visible_1W, as_matrix(values), 0)
  mixed_MF = jnp.einsum("MW,FW->MF", weights_MW.astype(spread.dtype), values_FW, **f32)
  mixed_MF = jnp.where(is_own_MF, mixed_MF, 0.0)
  mixed_MH = sum(mixed_MF[:, H * k : H * (k + 1)] for k in range(K))
  highest[0] = new_M1
  denominator[0] = shrunk_M1 * denominator[0] + sum_M1
  numerator[0] = shrunk_M1 * numerator[0] + mixed_MH
