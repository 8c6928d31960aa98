"""Where a program's time goes: seconds of a trace by operation of the source.

A trace names instructions of the compiled program; the program says which operation of
the source each came from. Instructions that run at the same time are counted each, so
the seconds may add up to more than the wall clock.
"""

import collections
import pathlib
import re

from jax.profiler import ProfileData

INSTRUCTION = re.compile(r"%?([\w.-]+) = .*?[\]})] ([\w-]+)\(")
SOURCE = re.compile(r'op_name="([^"]*)"')
CONTAINERS = ("while", "call", "conditional")  # hold the instructions of their body


def instructions(program: str) -> dict[str, tuple[str, str]]:
  """Returns (opcode, operation of the source) by the name of an instruction.

  Args:
    program: `compiled.as_text()`.
  """
  found = {}
  for line in program.splitlines():
    if match := INSTRUCTION.search(line):
      source = SOURCE.search(line)
      found[match[1]] = (match[2], source[1] if source else "")
  return found


def seconds_by_operation(trace: pathlib.Path, program: str) -> list[tuple[str, float]]:
  """Returns (operation, seconds), the longest first.

  Args:
    trace: folder that `jax.profiler.start_trace` wrote.
    program: `compiled.as_text()` of what ran.
  """
  known = instructions(program)
  total = collections.Counter()
  newest = max(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  for plane in ProfileData.from_file(str(newest)).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        opcode, source = known.get(str(name), ("", ""))
        if opcode and opcode not in CONTAINERS:
          total[operation(opcode, source)] += event.duration_ns / 1e9
  return total.most_common()


def operation(opcode: str, source: str) -> str:
  """Returns e.g. 'fusion of backward attend/dot_general' of a source's path."""
  direction = "backward" if "transpose(" in source else "forward"
  parts = [part for part in source.split("/") if "(" not in part]
  return f"{opcode} of {direction} {'/'.join(parts[-2:])}"
