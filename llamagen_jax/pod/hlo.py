"""Counts what one chip does in a compiled program, from its optimised HLO.

The compiler's own cost analysis counts the body of a loop once. Here every
computation counts as often as it runs: loops by their trip counts.
"""

import collections
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

import numpy as np

from llamagen_jax.pod.hlo_text import (
  Op,
  branches,
  declared_cost,
  group_size,
  is_reduce_scatter,
  parse,
  source_of,
)

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
# They move nothing themselves.
FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
  "partition-id", "replica-id", "opt-barrier", "while", "call", "conditional",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a chip's HBM while the program runs."""

  arguments: int
  outputs: int  # beyond those that overwrite a donated argument
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Collective:
  """All runs of one kind of exchange between groups of one size."""

  kind: str
  group: int  # chips that exchange
  count: int
  size: int  # bytes of the whole arrays, summed over the runs
  largest: int  # bytes of the largest single run

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in a ring, the least that any algorithm needs."""
    share = (self.group - 1) / max(self.group, 1)
    return self.size * {"all-reduce": 2 * share, "collective-permute": 1}.get(
      self.kind, share
    )


@dataclasses.dataclass(frozen=True)
class Copy:
  """An array that is copied from HBM to HBM."""

  shape: str
  count: int
  size: int  # bytes of one
  op_name: str


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What one chip does in one run of a program."""

  memory: Memory
  flops: float  # of matrix products and convolutions, a multiply-add being two
  bytes: float  # read from and written to HBM
  collectives: tuple[Collective, ...]
  copies: tuple[Copy, ...]  # the most expensive first
  silent_kernels: int = 0  # runs of kernels that do not say what they compute


def analyse(compiled: Any) -> Analysis:
  """Analyses a `jax.stages.Compiled`."""
  return analyse_text(compiled.as_text(), memory_of(compiled))


def memory_of(compiled: Any) -> Memory:
  """What a `jax.stages.Compiled` takes of a chip's HBM."""
  m = compiled.memory_analysis()
  return Memory(
    m.argument_size_in_bytes,
    m.output_size_in_bytes - m.alias_size_in_bytes,
    m.temp_size_in_bytes,
    m.generated_code_size_in_bytes,
  )


def analyse_text(text: str, memory: Memory) -> Analysis:
  counter = _Counter(*parse(text))
  counter.run()
  collectives = [
    Collective(kind, group, *totals)
    for (kind, group), totals in sorted(counter.collectives.items())
  ]
  copies = [Copy(*key[:1], count, *key[1:]) for key, count in counter.copies.items()]
  copies.sort(key=lambda copy: -copy.count * copy.size)
  return Analysis(
    memory,
    counter.flops,
    counter.bytes,
    tuple(collectives),
    tuple(copies),
    counter.silent_kernels,
  )


class _Counter:
  """Walks the program from its entry, multiplying by trip counts."""

  def __init__(self, computations, roots, entry):
    self._computations, self._roots, self._entry = computations, roots, entry
    self.flops = self.bytes = 0.0
    self.silent_kernels = 0
    self.collectives = collections.defaultdict(lambda: [0, 0, 0])
    self.copies = collections.Counter()
    self._channels: set[str] = set()  # of exchanges inside of fusions

  def run(self) -> None:
    self._walk(self._entry, 1, fused=False)

  def _walk(self, computation: str, runs: int, fused: bool) -> None:
    ops = self._computations[computation]
    for op in ops.values():
      if op.kind == "while":
        trips = self._trips(ops, op)
        self._walk(op.attribute("body"), runs * trips, fused)
      elif op.kind in ("fusion", "call", "async-start"):
        inside = fused or op.kind == "fusion"
        callee = op.attribute("calls") or op.attribute("to_apply")
        if is_reduce_scatter(op):
          self._exchange("reduce-scatter", self._inner_reduce(callee), runs, callee)
        else:
          self._walk(callee, runs, inside)
      elif op.kind == "conditional":
        for branch in branches(op):
          self._walk(branch, runs, fused)
      elif op.kind == "dot":
        self.flops += runs * _dot_flops(ops, op)
      elif op.kind == "convolution":
        self.flops += runs * _convolution_flops(ops, op)
      elif op.kind == "custom-call":
        declared = declared_cost(op, "flops")
        self.flops += runs * declared
        if "tpu_custom_call" in op.attributes and not declared:
          self.silent_kernels += runs
      elif op.kind.removesuffix("-start") in COLLECTIVES and not (
        fused and self._is_continued(op)
      ):
        self._exchange(op.kind.removesuffix("-start"), op, runs, computation)
      if not fused:
        self.bytes += runs * self._moved(ops, op)
        self._note_copy(ops, op, runs)

  def _is_continued(self, op: Op) -> bool:
    """A TPU hides an exchange behind several fusions, each of which repeats it."""
    channel = op.attribute("channel_id")
    known = channel in self._channels
    if channel:
      self._channels.add(channel)
    return known

  def _inner_reduce(self, computation: str) -> Op:
    ops = self._computations[computation].values()
    return next(op for op in ops if op.kind.startswith(("all-reduce", "reduce-sc")))

  def _exchange(self, kind: str, op: Op, runs: int, computation: str) -> None:
    """Notes a collective; its size is that of the whole arrays."""
    ops = self._computations[computation]
    given = sum(
      a.bytes for name in op.operands if name in ops for a in ops[name].arrays
    )
    group = group_size(op)
    # Operands are parts of what is gathered, and the whole of all else.
    size = given * group if kind == "all-gather" else given
    totals = self.collectives[kind, group]
    totals[0] += runs
    totals[1] += runs * size
    totals[2] = max(totals[2], size)

  def _trips(self, ops: dict[str, Op], loop: Op) -> int:
    """How often a loop that counts to a constant runs its body."""
    known = re.search(r'known_trip_count\D*?"?n"?:"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    condition, body = loop.attribute("condition"), loop.attribute("body")
    inside, test = self._computations[condition], self._roots[condition]
    names = test.operands
    if test.kind == "fusion":
      parameters, test = self._callee(test)
      names = [names[parameters[name]] for name in test.operands]
    start = ops[loop.operands[0]]
    if test.kind != "compare":
      raise ValueError(f"loop {loop.name}: no trip count in its condition")

    def resolve(name):
      op = source_of(inside, name)
      if op.kind == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", op.attributes)[1])
        return source_of(ops, start.operands[index]), index
      return op, None

    (first, index), (limit, _) = (resolve(name) for name in names)
    step = self._step(body, index)
    trips = (int(limit.literal) - int(first.literal)) / step
    inclusive = re.search(r"direction=(LE|GE)", test.attributes) is not None
    return max(0, math.floor(trips) + 1 if inclusive else math.ceil(trips))

  def _callee(self, fusion: Op) -> tuple[dict[str, int], Op]:
    callee = fusion.attribute("calls")
    parameters = {
      op.name: int(op.literal)
      for op in self._computations[callee].values()
      if op.kind == "parameter"
    }
    return parameters, self._roots[callee]

  def _step(self, body: str, index: int) -> int:
    """What the loop's counter grows by."""
    ops, root = self._computations[body], self._roots[body]
    update = source_of(ops, root.operands[index])
    if update.kind == "add":
      for name in update.operands:
        if source_of(ops, name).kind == "constant":
          return int(source_of(ops, name).literal)
    return 1

  def _moved(self, ops: dict[str, Op], op: Op) -> float:
    """Bytes of HBM that an operation outside of fusions reads and writes."""
    if op.kind in FREE or op.kind.endswith("-done") or op.kind == "async-start":
      return 0
    if op.kind == "custom-call":
      if declared := declared_cost(op, "bytes_accessed"):
        return declared
      if "tpu_custom_call" not in op.attributes:
        return 0
    written = op.arrays
    if op.kind == "copy-start":
      written = op.arrays[:1]  # (target, source, ..), while others begin with sources
    elif op.kind.endswith("-start"):
      written = op.arrays[1:2]
    total = sum(a.bytes for a in written if a.in_hbm)
    if op.kind in ("slice-start", "dynamic-slice", "slice", "gather"):
      return total + sum(a.bytes for a in written)
    if op.kind == "dynamic-update-slice":
      return 2 * sum(a.bytes for a in ops[op.operands[1]].arrays)
    if op.kind == "fusion":
      return self._fusion_moved(ops, op, total)
    return total + sum(
      a.bytes
      for name in op.operands
      if name in ops
      for a in ops[name].arrays
      if a.in_hbm
    )

  def _fusion_moved(self, op_ops: dict[str, Op], op: Op, written: float) -> float:
    """A fusion reads only the slices it takes, and writes only those it updates."""
    total = written
    for ops, inner in self._inside(op):
      if inner.kind == "dynamic-update-slice":
        update = sum(a.bytes for a in ops[inner.operands[1]].arrays)
        total -= max(0, min(total, sum(a.bytes for a in inner.arrays)) - update)
    for position, name in enumerate(op.operands):
      whole = sum(a.bytes for a in op_ops[name].arrays if a.in_hbm)
      total += min(whole, self._read(op, position, whole))
    return total

  def _inside(self, fusion: Op) -> Iterator[tuple[dict[str, Op], Op]]:
    """All operations of a fusion, and of the fusions in it."""
    ops = self._computations[fusion.attribute("calls")]
    for op in ops.values():
      yield ops, op
      if op.kind == "fusion":
        yield from self._inside(op)

  def _read(self, user: Op, position: int, whole: int) -> int:
    """Bytes of an operand that an operation inside of fusions looks at.

    A layer's weights are often cut out of the stack of all layers by a fusion that
    lies in the one that multiplies with them.
    """
    if user.kind in ("dynamic-slice", "slice", "gather") and position == 0:
      return sum(a.bytes for a in user.arrays)
    if user.kind == "dynamic-update-slice" and position == 0:
      return 0
    if user.kind != "fusion":
      return whole
    ops = self._computations[user.attribute("calls")]
    parameter = next(
      op.name
      for op in ops.values()
      if op.kind == "parameter" and int(op.literal) == position
    )
    return sum(self._read(*use, whole) for use in self._uses(ops, parameter))

  def _uses(self, ops: dict[str, Op], name: str) -> Iterator[tuple[Op, int]]:
    """Operations that take a value, in another shape or not, and as which operand."""
    for op in ops.values():
      for position, operand in enumerate(op.operands):
        if operand == name and self._renames(op):
          yield from self._uses(ops, op.name)
        elif operand == name:
          yield op, position

  def _renames(self, op: Op) -> bool:
    """A bitcast, or a fusion of nothing else."""
    if op.kind != "fusion":
      return op.kind == "bitcast"
    ops = self._computations[op.attribute("calls")].values()
    return all(inner.kind in ("parameter", "bitcast") for inner in ops)

  def _note_copy(self, ops: dict[str, Op], op: Op, runs: int) -> None:
    if op.kind not in ("copy", "copy-start") or not op.operands:
      return
    source = ops[op.operands[0]].arrays[0]
    target = op.arrays[0]
    if source.in_hbm and target.in_hbm and source.shape == target.shape:
      if op.kind == "copy-start" and not op.arrays[1].in_hbm:
        return
      shape = f"{target.dtype}[{','.join(map(str, target.shape))}]"
      name = re.search(r'op_name="([^"]*)"', op.attributes)
      self.copies[shape, target.bytes, name[1] if name else ""] += runs


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
