"""The counter, on programs whose cost is known."""

import jax
import jax.numpy as jnp
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.pod import compiler, hlo, hlo_cost, topology

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
  compiled = jax.jit(matmul_chain).lower(*SHAPES).compile()
  found = hlo.analyse_text(compiled.as_text(), hlo.memory_of(compiled))
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


@pytest.mark.parametrize("renamed", ["bitcast", "copy"])
def test_fusions_in_fusions_read_and_write_slices(renamed):
  """A row is cut out of a stack two fusions deep, and its double written back.

  A TPU's fusions cut slices of 8 bits out of copies in smaller tiles, of which no more
  than the slice is made.
  """
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
  text = text.replace("bitcast(%old)", f"{renamed}(%old)")
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


def test_an_exchange_between_slices():
  text = """HloModule m

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %begin = token[] after-all()
  %send = (bf16[4,8]{1,0}, u32[]{:S(2)}, token[]) send(%x, %begin), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=1
  %recv = (bf16[4,8]{1,0}, u32[]{:S(2)}, token[]) recv(%begin), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (bf16[4,8]{1,0}, token[]) recv-done(%recv), channel_id=2
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%received), index=0
}
"""  # noqa: E501
  found = hlo.analyse_text(text, NO_MEMORY)
  (exchange,) = found.collectives
  assert (exchange.kind, exchange.network, exchange.group) == ("all-reduce", "DCN", 3)
  size = 2 * 4 * 8
  assert exchange.sent == pytest.approx(2 * 2 / 3 * size)
  assert found.bytes == 2 * size  # read once, and written once


def test_costs_add_and_repeat():
  gather = ("all-gather", 4, "ICI")
  one = hlo_cost.Cost(2.0, 3.0, 1, {gather: hlo_cost.Exchanged(1, 8, 8)}, {})
  two = hlo_cost.Cost(bytes=1.0, exchanges={gather: hlo_cost.Exchanged(1, 6, 6)})
  total = (one + two) * 3
  assert (total.flops, total.bytes, total.silent_kernels) == (6.0, 12.0, 3)
  assert total.exchanges == {gather: hlo_cost.Exchanged(6, 42, 8)}
  assert one * 0 == hlo_cost.Cost(exchanges={gather: hlo_cost.Exchanged()})


def test_planned_memory_counts_hbm_only():
  found = hlo.planned_memory("""BufferAssignment:
allocation 0: size 512, thread-local:
 value: <1 a @0> (size=4,offset=0): f32[]
allocation 1: size 4096, parameter 1, shape |f32[1024]| at {}, maybe-live-out:
allocation 2: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {}:
allocation 3: size 64, maybe-live-out:
allocation 4: size 4, constant:
allocation 5: size 2048, preallocated-temp:
allocation 6: size 999, color 1, preallocated-temp:
""")
  assert found == hlo.Memory(arguments=5120, outputs=64, temporaries=2048, code=0)


def layers(count: int):
  """A chain of layers without a loop, as XLA's own cost analysis can count it."""

  def forward(x, weights):
    for layer in range(count):
      x = jax.nn.gelu(x @ weights[layer])
    return x

  shapes = (SHAPES[0], jax.ShapeDtypeStruct((count, 32, 32), jnp.float32))
  return jax.jit(forward).lower(*shapes).compile()


def test_bytes_and_flops_agree_with_xlas_cost_analysis_of_L_and_2L_layers():  # noqa: N802
  """The difference of L and 2L layers is L layers, without what all have in common."""

  def difference(count):
    few, many = layers(4), layers(8)
    return [b - a for a, b in zip(count(few), count(many), strict=True)]

  def ours(compiled):
    found = hlo.analyse_text(compiled.as_text(), NO_MEMORY)
    return found.bytes, found.flops

  def xlas(compiled):
    cost = compiled.cost_analysis()
    return cost["bytes accessed"], cost["flops"]

  ours_bytes, ours_flops = difference(ours)
  xlas_bytes, xlas_flops = difference(xlas)
  assert ours_flops == 4 * 2 * 16 * 32 * 32
  assert ours_bytes == pytest.approx(xlas_bytes, rel=0.05)
  assert ours_flops == pytest.approx(xlas_flops, rel=0.2)  # theirs counts gelu, too


@pytest.mark.extra
def test_the_tpu_compiler_counts_the_same():
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  mesh = topology.mesh("v5e:2x2")
  whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole) for s in SHAPES]
  with jax.set_mesh(mesh):
    lowered = jax.jit(matmul_chain).lower(*shapes)
  found = compiler.analysed(lowered)
  assert found.flops == CHAIN_FLOPS and found.machine_code
  assert topology.chip(mesh).name == "v5e"
  quick = compiler.analysed(lowered, quick=True)
  assert (quick.flops, quick.bytes) == (found.flops, found.bytes)
  assert quick.memory.arguments == found.memory.arguments


@pytest.mark.extra
def test_two_slices_exchange_gradients_only():
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  chips = topology.devices("v5e:2x2x2")
  mesh = make_mesh(data=2, fsdp=4, devices=chips)
  assert topology.num_slices(mesh) == 2
  for row, wanted in zip(mesh.devices, (0, 1), strict=True):
    assert {chip.slice_index for chip in row.flat} == {wanted}
  spec = jax.sharding.PartitionSpec
  x = jax.NamedSharding(mesh, spec(("data", "fsdp")))
  weights = jax.NamedSharding(mesh, spec(None, "fsdp"))

  def step(x, weights):
    loss = lambda w: matmul_chain(x, w).sum()  # noqa: E731
    return weights - jax.grad(loss)(weights)

  shapes = [
    jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=x),
    jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16, sharding=weights),
  ]
  with jax.set_mesh(mesh):
    lowered = jax.jit(step, out_shardings=weights).lower(*shapes)
  found = compiler.analysed(lowered, quick=True)
  between = [c for c in found.collectives if c.network == "DCN"]
  assert {c.kind for c in between} == {"all-reduce"}
  assert {c.group for c in between} == {2}
  # A chip exchanges its quarter of a gradient, once a product of the loops.
  assert sum(c.size for c in between) == 5 * 3 * 2 * 256 * 256 / 4
  with pytest.raises(UserError, match="slices=3, but the chips come from 2 slices"):
    make_mesh(devices=chips, slices=3)
