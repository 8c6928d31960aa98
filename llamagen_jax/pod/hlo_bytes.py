"""Bytes of HBM that the operations of an HLO program read and write."""

from collections.abc import Iterator

from llamagen_jax.pod.hlo_text import Op, Program, declared_cost

# Kinds that move nothing themselves.
NO_TRAFFIC = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
  "partition-id", "replica-id", "opt-barrier", "while", "call", "conditional",
  "async-start",
}  # fmt: skip
RENAMES = ("bitcast", "copy")
SLICES = ("dynamic-slice", "slice", "gather")


def moved_bytes(program: Program, ops: dict[str, Op], op: Op) -> float:
  """Returns the bytes of HBM that an operation outside of fusions reads and writes.

  Args:
    program: the whole program.
    ops: operations of the computation that `op` is in.
    op: the operation.
  """
  if op.kind in NO_TRAFFIC or op.kind.endswith("-done"):
    return 0
  if op.kind == "custom-call":
    if declared := declared_cost(op, "bytes_accessed"):
      return declared
    if "tpu_custom_call" not in op.attributes:
      return 0
  if op.kind == "send":  # to another slice: (data, context, token)
    return _hbm(op.arrays[:1])
  written = op.arrays
  if op.kind in ("copy-start", "recv"):
    written = op.arrays[:1]  # (target, source, ..), while others begin with sources
  elif op.kind.endswith("-start"):
    written = op.arrays[1:2]
  total = _hbm(written)
  if op.kind == "slice-start" or op.kind in SLICES:
    return total + sum(a.bytes for a in written)
  if op.kind == "dynamic-update-slice":
    return 2 * sum(a.bytes for a in ops[op.operands[1]].arrays)
  if op.kind == "fusion":
    return _moved_by_fusion(program, ops, op, total)
  return total + sum(_hbm(ops[name].arrays) for name in op.operands if name in ops)


def _hbm(arrays) -> int:
  return sum(a.bytes for a in arrays if a.in_hbm)


def _moved_by_fusion(program: Program, ops: dict[str, Op], op: Op, written: float):
  """A fusion reads only the slices it takes, and writes only those it updates."""
  total = written
  for inner_ops, inner in _inside(program, op):
    if inner.kind == "dynamic-update-slice":
      update = sum(a.bytes for a in inner_ops[inner.operands[1]].arrays)
      total -= max(0, min(total, sum(a.bytes for a in inner.arrays)) - update)
  for position, name in enumerate(op.operands):
    whole = _hbm(ops[name].arrays)
    total += min(whole, _read(program, op, position, whole))
  return total


def _inside(program: Program, fusion: Op) -> Iterator[tuple[dict[str, Op], Op]]:
  """Yields all operations of a fusion, and of the fusions in it."""
  ops = program.computations[fusion.attribute("calls")]
  for op in ops.values():
    yield ops, op
    if op.kind == "fusion":
      yield from _inside(program, op)


def _read(program: Program, user: Op, position: int, whole: int) -> int:
  """Returns the bytes of an operand that an operation inside of fusions reads.

  A layer's weights are often cut out of the stack of all layers by a fusion inside
  the one that multiplies with them.
  """
  if user.kind in SLICES and position == 0:
    return sum(a.bytes for a in user.arrays)
  if user.kind == "dynamic-update-slice" and position == 0:
    return 0
  if user.kind != "fusion":
    return whole
  ops = program.computations[user.attribute("calls")]
  parameter = next(
    op.name
    for op in ops.values()
    if op.kind == "parameter" and int(op.literal) == position
  )
  return sum(_read(program, *use, whole) for use in _uses(program, ops, parameter))


def _uses(program: Program, ops: dict[str, Op], name: str) -> Iterator[tuple[Op, int]]:
  """Yields the operations that take a value, reshaped or not, and as which operand."""
  for op in ops.values():
    for position, operand in enumerate(op.operands):
      if operand == name and _renames(program, op):
        yield from _uses(program, ops, op.name)
      elif operand == name:
        yield op, position


def _renames(program: Program, op: Op) -> bool:
  """Returns whether an operation inside of a fusion only renames elements.

  A copy does, too: it says in which tiles a fusion looks at its operand, of which only
  what the fusion needs is read.
  """
  if op.kind != "fusion":
    return op.kind in RENAMES
  ops = program.computations[op.attribute("calls")].values()
  return all(inner.kind in ("parameter", *RENAMES) for inner in ops)
