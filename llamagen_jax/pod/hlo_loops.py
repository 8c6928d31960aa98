"""Trip counts of the loops of an HLO program."""

import math
import re

from llamagen_jax.pod.hlo_text import Op, Program, source_of


def trip_count(program: Program, ops: dict[str, Op], loop: Op) -> int:
  """Returns how often a loop that counts to a constant runs its body.

  Args:
    program: the whole program.
    ops: operations of the computation that the loop is in.
    loop: a `while`.

  Raises:
    ValueError: the loop's condition is not a comparison.
  """
  known = re.search(r'known_trip_count\D*?"?n"?:"?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  condition, body = loop.attribute("condition"), loop.attribute("body")
  inside, test = program.computations[condition], program.roots[condition]
  names = test.operands
  if test.kind == "fusion":
    parameters, test = _callee(program, test)
    names = [names[parameters[name]] for name in test.operands]
  start = ops[loop.operands[0]]
  if test.kind != "compare":
    raise ValueError(f"loop {loop.name}: no trip count in its condition")

  def resolve(name: str) -> tuple[Op, int | None]:
    """Returns the constant behind a value, and its index in the loop's state."""
    op = source_of(inside, name)
    if op.kind == "get-tuple-element":
      index = int(re.search(r"index=(\d+)", op.attributes)[1])
      return source_of(ops, start.operands[index]), index
    return op, None

  (first, index), (limit, _) = (resolve(name) for name in names)
  trips = (int(limit.literal) - int(first.literal)) / _step(program, body, index)
  inclusive = re.search(r"direction=(LE|GE)", test.attributes) is not None
  return max(0, math.floor(trips) + 1 if inclusive else math.ceil(trips))


def _callee(program: Program, fusion: Op) -> tuple[dict[str, int], Op]:
  """Returns the positions of a fusion's parameters by name, and its root."""
  callee = fusion.attribute("calls")
  parameters = {
    op.name: int(op.literal)
    for op in program.computations[callee].values()
    if op.kind == "parameter"
  }
  return parameters, program.roots[callee]


def _step(program: Program, body: str, index: int) -> int:
  """Returns the number that the loop's counter grows by."""
  ops, root = program.computations[body], program.roots[body]
  update = source_of(ops, root.operands[index])
  if update.kind == "add":
    for name in update.operands:
      if source_of(ops, name).kind == "constant":
        return int(source_of(ops, name).literal)
  return 1
