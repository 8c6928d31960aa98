"""Reads the text of an optimised HLO program."""

import dataclasses
import math
import re

BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
  "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
  "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
ALIASES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


@dataclasses.dataclass(frozen=True)
class Array:
  """A shape in the program's text."""

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> int:
    return int(math.prod(self.shape) * BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation: `%name = arrays kind(operands), attributes`."""

  name: str
  kind: str
  arrays: tuple[Array, ...]  # of the result, tuples flattened
  operands: tuple[str, ...]
  literal: str  # the text between the parentheses
  attributes: str

  def attribute(self, name: str) -> str:
    """Returns the value of an attribute, without its %; empty if there is none."""
    found = re.search(rf"[ ,]{name}=(%?[\w.\-]+)", self.attributes)
    return found[1].lstrip("%") if found else ""

  @property
  def source(self) -> str:
    """Returns the path of the operation that it came from, "" if that is not known."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ASSIGN = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a program, as tables of operations by their names."""

  computations: dict[str, dict[str, Op]]
  roots: dict[str, Op]  # of the computations
  entry: str  # name of the computation that runs first


def parse(text: str) -> Program:
  """Reads the text of a program."""
  computations, roots, entry, current = {}, {}, "", ""
  for line in text.splitlines():
    line = re.sub(r"/\*.*?\*/", "", line)
    if head := _HEAD.match(line):
      current = head[2]
      computations[current] = {}
      entry = current if head[1] else entry
    elif (assign := _ASSIGN.match(line)) and current:
      op = _parse_op(assign[2], line[assign.end() :])
      computations[current][op.name] = op
      if assign[1]:
        roots[current] = op
  return Program(computations, roots, entry)


def _parse_op(name: str, text: str) -> Op:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opened = text.index("(", end)
  closed = _closing(text, opened)
  literal = text[opened + 1 : closed]
  arrays = [
    Array(
      dtype,
      tuple(int(size) for size in shape.split(",") if size),
      not re.search(r"S\([1-9]", layout),
    )
    for dtype, shape, layout in _ARRAY.findall(text[:end])
  ]
  return Op(
    name,
    text[end:opened].strip(),
    tuple(arrays),
    tuple(re.findall(r"%([\w.\-]+)", literal)),
    literal,
    text[closed + 1 :],
  )


def _closing(text: str, opened: int) -> int:
  """Returns the index of the parenthesis that closes the one at `opened`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, opened):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  raise ValueError(f"unbalanced HLO: {text[:80]}")


def source_of(ops: dict[str, Op], name: str) -> Op:
  """Returns the operation that a scalar comes from."""
  op = ops[name]
  while op.kind in ALIASES and op.operands:
    op = ops[op.operands[0]]
  return op


def branches(op: Op) -> list[str]:
  """Returns the names of the computations that a conditional chooses from."""
  listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
  if listed:
    return re.findall(r"%?([\w.\-]+)", listed[1])
  return [op.attribute("true_computation"), op.attribute("false_computation")]


def is_reduce_scatter(op: Op) -> bool:
  """Returns whether a fusion is a TPU's reduce-scatter: all-reduce and slice in one."""
  return op.kind == "fusion" and "all-reduce-scatter" in op.attribute("calls")


def group_size(op: Op) -> int:
  """Returns the number of chips that take part in one exchange."""
  text = op.attributes
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=", text):
    return int(found[1].split(",")[-1])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return found[1].count(",") + 1
  return 2  # collective-permute: a chip and its neighbour


def slices_of(op: Op) -> int:
  """Returns the number of slices that a transfer over the DCN goes between."""
  found = re.search(r'_xla_megascale_target="\{([^}]*)\}', op.attributes)
  count = 0
  for group in found[1].split(",") if found else ():
    first, _, last = group.partition(":")
    count += int(last or first) - int(first) + 1
  return max(count, 2)


def declared_cost(op: Op, field: str) -> float:
  """Returns a cost that a hand-written kernel declares, 0 if it does not."""
  found = re.search(rf'"{field}":\s*"?(\d+)', op.attributes)
  return float(found[1]) if found and "tpu_custom_call" in op.attributes else 0.0
