"""The cost of an HLO program: a sum over its operations, loops by their trip counts."""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import re

import numpy as np

from llamagen_jax.pod.hlo_bytes import moved_bytes
from llamagen_jax.pod.hlo_loops import trip_count
from llamagen_jax.pod.hlo_text import (
  Op,
  Program,
  branches,
  declared_cost,
  group_size,
  is_reduce_scatter,
  slices_of,
)

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
NOTHING: Mapping = {}


@dataclasses.dataclass(frozen=True)
class Exchanged:
  """Runs of one kind of exchange."""

  count: int = 0
  size: int = 0  # bytes of the whole arrays, summed over the runs
  largest: int = 0  # bytes of the largest single run

  def __add__(self, other: "Exchanged") -> "Exchanged":
    largest = max(self.largest, other.largest)
    return Exchanged(self.count + other.count, self.size + other.size, largest)

  def __mul__(self, runs: int) -> "Exchanged":
    return Exchanged(runs * self.count, runs * self.size, self.largest if runs else 0)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a part of a program does on one chip; costs add, and repeat by `*`."""

  flops: float = 0.0
  bytes: float = 0.0
  silent_kernels: int = 0
  # (kind, chips or slices that exchange, network) -> runs
  exchanges: Mapping[tuple[str, int, str], Exchanged] = dataclasses.field(
    default_factory=dict
  )
  # (shape, bytes, op_name) -> runs
  copies: Mapping[tuple[str, int, str], int] = dataclasses.field(default_factory=dict)

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      self.silent_kernels + other.silent_kernels,
      _merged(self.exchanges, other.exchanges, Exchanged()),
      _merged(self.copies, other.copies, 0),
    )

  def __mul__(self, runs: int) -> "Cost":
    return Cost(
      runs * self.flops,
      runs * self.bytes,
      runs * self.silent_kernels,
      {key: value * runs for key, value in self.exchanges.items()},
      {key: value * runs for key, value in self.copies.items()},
    )


def _merged(a: Mapping, b: Mapping, zero) -> Mapping:
  if not a or not b:
    return a or b
  return dict(a) | {key: a.get(key, zero) + value for key, value in b.items()}


def cost_of(program: Program) -> Cost:
  """Returns the cost of one run of a program on one chip."""
  return _Costs(program).of_computation(program.entry, False)


class _Costs:
  """Adds up costs from the entry downwards, with one method a kind of operation.

  A method takes the operations of a computation, one of them, and whether they are
  inside of a fusion, where nothing goes through HBM.
  """

  def __init__(self, program: Program):
    self._program = program
    self._repeats = _repeated_exchanges(program)
    self._handlers: dict[str, Callable[[dict[str, Op], Op, bool], Cost]] = {
      "while": self._loop,
      "fusion": self._call,
      "call": self._call,
      "async": self._call,
      "conditional": self._conditional,
      "dot": lambda ops, op, fused: Cost(flops=_dot_flops(ops, op)),
      "convolution": lambda ops, op, fused: Cost(flops=_convolution_flops(ops, op)),
      "custom-call": self._kernel,
      "send": self._send,
      **dict.fromkeys(COLLECTIVES, self._exchange),
    }

  @functools.cache  # noqa: B019 - lives as long as the program is counted
  def of_computation(self, name: str, fused: bool) -> Cost:
    ops = self._program.computations[name]
    return sum((self._of(ops, op, fused) for op in ops.values()), Cost())

  def _of(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    handler = self._handlers.get(op.kind.removesuffix("-start"))
    cost = handler(ops, op, fused) if handler else Cost()
    if fused:
      return cost
    moved = moved_bytes(self._program, ops, op)
    return cost + Cost(bytes=moved, copies=_copies(ops, op))

  def _loop(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    trips = trip_count(self._program, ops, op)
    return self.of_computation(op.attribute("body"), fused) * trips

  def _call(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    callee = op.attribute("calls") or op.attribute("to_apply")
    if is_reduce_scatter(op):
      inside = self._program.computations[callee]
      reduce = next(
        o for o in inside.values() if o.kind.startswith(("all-reduce", "reduce-sc"))
      )
      return _exchange_cost("reduce-scatter", inside, reduce)
    return self.of_computation(callee, fused or op.kind == "fusion")

  def _conditional(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    """All branches, as if each of them ran: the compiler cannot say which one will."""
    return sum((self.of_computation(name, fused) for name in branches(op)), Cost())

  def _kernel(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    declared = declared_cost(op, "flops")
    silent = "tpu_custom_call" in op.attributes and not declared
    return Cost(flops=declared, silent_kernels=int(silent))

  def _exchange(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    if fused and op.name in self._repeats:
      return Cost()
    return _exchange_cost(op.kind.removesuffix("-start"), ops, op)

  def _send(self, ops: dict[str, Op], op: Op, fused: bool) -> Cost:
    """An exchange between slices, which a chip's host takes over the network."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
    if not kind:
      return Cost()
    name = kind[1].lower().replace("_", "-")
    return _exchange_cost(name, ops, op, slices_of(op), "DCN")


def _repeated_exchanges(program: Program) -> set[str]:
  """Names of exchanges inside of fusions that go on with one counted before.

  A TPU hides an exchange behind several fusions, each of which repeats it.
  """
  called = {
    op.attribute("calls")
    for ops in program.computations.values()
    for op in ops.values()
    if op.kind == "fusion" and not is_reduce_scatter(op)
  }
  channels, repeats = set(), set()
  for name, ops in program.computations.items():
    for op in ops.values() if name in called else ():
      channel = op.attribute("channel_id")
      if channel and op.kind.removesuffix("-start") in COLLECTIVES:
        if channel in channels:
          repeats.add(op.name)
        channels.add(channel)
  return repeats


def _exchange_cost(
  kind: str,
  ops: dict[str, Op],
  op: Op,
  group: int | None = None,
  network: str = "ICI",
) -> Cost:
  """Returns one run of an exchange; its size is that of the whole arrays."""
  given = sum(a.bytes for name in op.operands if name in ops for a in ops[name].arrays)
  group = group_size(op) if group is None else group
  # Operands are shards of the gathered array, and whole arrays in all other kinds.
  size = given * group if kind == "all-gather" else given
  return Cost(exchanges={(kind, group, network): Exchanged(1, size, size)})


def _copies(ops: dict[str, Op], op: Op) -> Mapping[tuple[str, int, str], int]:
  """Returns a copy from HBM to HBM, if the operation is one."""
  if op.kind not in ("copy", "copy-start") or not op.operands:
    return NOTHING
  source, target = ops[op.operands[0]].arrays[0], op.arrays[0]
  if not (source.in_hbm and target.in_hbm and source.shape == target.shape):
    return NOTHING
  if op.kind == "copy-start" and not op.arrays[1].in_hbm:
    return NOTHING
  shape = f"{target.dtype}[{','.join(map(str, target.shape))}]"
  return collections.Counter([(shape, target.bytes, op.source)])


def _dot_flops(ops: dict[str, Op], op: Op) -> float:
  lhs = ops[op.operands[0]].arrays[0].shape
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)[1]
  contracted = math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)
  return 2.0 * math.prod(op.arrays[0].shape) * contracted


def _convolution_flops(ops: dict[str, Op], op: Op) -> float:
  """Multiply-adds on elements that exist: neither padding nor dilation's holes.

  The TPU's matrix products are convolutions too, batch axes being dilated so far
  that every output element sees one element only.
  """
  found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
  lhs, rhs, out = (
    dict(zip(labels, array.shape, strict=True))
    for labels, array in zip(
      found.groups(),
      (*(ops[name].arrays[0] for name in op.operands[:2]), op.arrays[0]),
      strict=True,
    )
  )
  spatial = sorted(label for label in out if label.isdigit())
  window = _window(op.attributes, len(spatial))
  flops = 2.0 * out["b"] * out["f"] * rhs["i"]
  for axis, label in enumerate(spatial):
    stride, low, dilation, kernel_dilation = window[axis]
    at = np.add.outer(
      np.arange(out[label]) * stride - low, np.arange(rhs[label]) * kernel_dilation
    )
    valid = (at >= 0) & (at <= (lhs[label] - 1) * dilation) & (at % dilation == 0)
    flops *= np.count_nonzero(valid)
  return flops


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int]]:
  """Stride, low padding and the dilations of input and kernel, an axis each."""
  if not axes:
    return []
  text = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(f.split("=") for f in text[1].split()) if text else {}
  ones = "x".join(["1"] * axes)
  columns = [fields.get(n, ones) for n in ("stride", "lhs_dilate", "rhs_dilate")]
  stride, dilation, kernel = ([int(v) for v in c.split("x")] for c in columns)
  padding = fields.get("pad", "x".join(["0_0"] * axes)).split("x")
  low = [int(pad.split("_")[0]) for pad in padding]
  return list(zip(stride, low, dilation, kernel, strict=True))
