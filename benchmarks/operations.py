"""Where a program's time goes: seconds of a trace by operation of the source.

A trace names operations of the compiled program; the program says which operation of
the source each came from. Operations that run at the same time are counted each, so
the seconds may add up to more than the wall clock.
"""

import collections
import pathlib

from jax.profiler import ProfileData

from llamagen_jax.pod.hlo_text import Op, parse

CONTAINERS = ("while", "call", "conditional")  # hold the operations of their body


def seconds_by_operation(trace: pathlib.Path, program: str) -> list[tuple[str, float]]:
  """Returns (operation, seconds), the longest first.

  Args:
    trace: folder that `jax.profiler.start_trace` wrote.
    program: `compiled.as_text()` of what ran.
  """
  known = collections.ChainMap(*parse(program).computations.values())
  total = collections.Counter()
  newest = max(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  for plane in ProfileData.from_file(str(newest)).planes:
    for line in plane.lines:
      for event in line.events:
        op = known.get(str(dict(event.stats).get("hlo_op")))
        if op and op.kind not in CONTAINERS:
          total[name_of(op)] += event.duration_ns / 1e9
  return total.most_common()


def name_of(op: Op) -> str:
  """Returns e.g. 'fusion of backward attend/dot_general', from its source's path."""
  direction = "backward" if "transpose(" in op.source else "forward"
  parts = [part for part in op.source.split("/") if "(" not in part]
  return f"{op.kind} of {direction} {'/'.join(parts[-2:])}"
