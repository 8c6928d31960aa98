"""The counter, on programs whose cost is known."""

import jax
import jax.numpy as jnp
import pytest

from llamagen_jax.pod import hlo, topology

NO_MEMORY = hlo.Memory(0, 0, 0, 0)


def matmul_chain(x, weights):
  """A loop in a loop: 5 x 3 products of [16, 32] and [32, 32]."""

  def inner(x, weight):
    return jnp.tanh(x @ weight), None

  def outer(x, _):
    return jax.lax.scan(inner, x, weights)[0], None

  return jax.lax.scan(outer, x, None, length=5)[0]


SHAPES = (
  jax.ShapeDtypeStruct((16, 32), jnp.float32),
  jax.ShapeDtypeStruct((3, 32, 32), jnp.float32),
)
CHAIN_FLOPS = 5 * 3 * 2 * 16 * 32 * 32


def test_loop_bodies_count_as_often_as_they_run():
  found = hlo.analyse(jax.jit(matmul_chain).lower(*SHAPES).compile())
  assert found.flops == CHAIN_FLOPS
  assert found.memory.arguments == 4 * (16 * 32 + 3 * 32 * 32)
  # Every run of the inner body reads a weight.
  assert found.bytes > 15 * 4 * 32 * 32


def test_collectives_count_whole_arrays_and_trips():
  text = """HloModule m

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %whole = f32[16,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %part = f32[4,8]{1,0} reduce-scatter(%whole), replica_groups=[2,4]<=[8]
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %part)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: f32[4,8]) -> (s32[], f32[4,8]) {
  %zero = s32[] constant(0)
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %b)
  ROOT %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""
  found = {c.kind: c for c in hlo.analyse_text(text, NO_MEMORY).collectives}
  size = 4 * 4 * 8
  assert (found["all-reduce"].count, found["all-reduce"].sent) == (1, size)
  for kind in ("all-gather", "reduce-scatter"):
    assert found[kind].count == 4  # 0, 2, 4, 6
    assert found[kind].sent == 4 * 3 * size
    assert found[kind].largest == 4 * size


@pytest.mark.extra
def test_the_tpu_compiler_counts_the_same():
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  mesh = topology.mesh("v5e:2x2")
  where = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in SHAPES]
  with jax.set_mesh(mesh):
    compiled = jax.jit(matmul_chain).lower(*shapes).compile()
  found = hlo.analyse(compiled)
  assert found.flops == CHAIN_FLOPS
  assert topology.torus(mesh) == (2, 2)
  assert topology.chip(mesh).name == "v5e"
