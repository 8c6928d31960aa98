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


def test_fusions_in_fusions_read_and_write_slices():
  """A row is cut out of a stack two fusions deep, and its double written back."""
  text = """HloModule m

%cut (stack: f32[24,8,16], row: s32[]) -> f32[8,16] {
  %stack = f32[24,8,16]{2,1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  %taken = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %row, %zero, %zero)
  ROOT %flat = f32[8,16]{1,0} bitcast(%taken)
}

%rename (old: f32[24,8,16]) -> f32[24,8,16] {
  %old = f32[24,8,16]{2,1,0} parameter(0)
  ROOT %name = f32[24,8,16]{2,1,0} bitcast(%old)
}

%put (target: f32[24,128], new: f32[8,16], where: s32[]) -> f32[24,128] {
  %target = f32[24,128]{1,0} parameter(0)
  %new = f32[8,16]{1,0} parameter(1)
  %where = s32[] parameter(2)
  %none = s32[] constant(0)
  %line = f32[1,128]{1,0} bitcast(%new)
  ROOT %written = f32[24,128]{1,0} dynamic-update-slice(%target, %line, %where, %none)
}

%outer (a: f32[24,8,16], b: f32[24,128], i: s32[]) -> f32[24,128] {
  %b = f32[24,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %a = f32[24,8,16]{2,1,0} parameter(0)
  %same = f32[24,8,16]{2,1,0} fusion(%a), kind=kLoop, calls=%rename
  %one = f32[8,16]{1,0} fusion(%same, %i), kind=kLoop, calls=%cut
  %two = f32[8,16]{1,0} add(%one, %one)
  ROOT %done = f32[24,128]{1,0} fusion(%b, %two, %i), kind=kLoop, calls=%put
}

ENTRY %main (x: f32[24,8,16], y: f32[24,128], j: s32[]) -> f32[24,128] {
  %x = f32[24,8,16]{2,1,0} parameter(0)
  %y = f32[24,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %out = f32[24,128]{1,0} fusion(%x, %y, %j), kind=kLoop, calls=%outer
}
"""
  row = 4 * 8 * 16
  assert hlo.analyse_text(text, NO_MEMORY).bytes == 2 * row + 4  # and the index


def test_an_exchange_behind_several_fusions_is_one():
  text = """HloModule m

%begin (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %first = f32[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8]
}

%end (q: f32[4,8], r: f32[16,8]) -> f32[16,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %r = f32[16,8]{1,0} parameter(1)
  %again = f32[16,8]{1,0} all-gather(%q), channel_id=3, replica_groups=[2,4]<=[8]
  ROOT %sum = f32[16,8]{1,0} add(%r, %again)
}

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %a = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %b = f32[16,8]{1,0} fusion(%x, %a), kind=kCustom, calls=%end
  %c = f32[16,8]{1,0} all-gather(%x), channel_id=4, replica_groups=[2,4]<=[8]
  ROOT %out = f32[16,8]{1,0} add(%b, %c)
}
"""
  (found,) = hlo.analyse_text(text, NO_MEMORY).collectives
  assert (found.count, found.size) == (2, 2 * 4 * 16 * 8)


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
