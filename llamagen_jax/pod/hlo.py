"""What one chip does in a compiled program, read from its optimised HLO.

The compiler's own cost analysis counts the body of a loop once. Here every
computation counts as often as it runs: loops by their trip counts.
"""

import dataclasses
import re
from typing import Any

from llamagen_jax.pod.hlo_cost import cost_of
from llamagen_jax.pod.hlo_text import parse


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
  group: int  # chips that exchange; slices, if over the DCN
  network: str  # "ICI" inside of a slice, "DCN" between slices
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
  silent_kernels: int = 0  # runs of kernels that do not declare their FLOPs
  machine_code: bool = True  # made; without it, kernels' scratch memory is not known


def analyse_text(text: str, memory: Memory, machine_code: bool = True) -> Analysis:
  """Analyses the text of an optimised program."""
  cost = cost_of(parse(text))
  collectives = [
    Collective(*key, runs.count, runs.size, runs.largest)
    for key, runs in sorted(cost.exchanges.items())
  ]
  copies = [
    Copy(shape, count, size, name) for (shape, size, name), count in cost.copies.items()
  ]
  copies.sort(key=lambda copy: -copy.count * copy.size)
  return Analysis(
    memory, cost.flops, cost.bytes, tuple(collectives), tuple(copies),
    cost.silent_kernels, machine_code,
  )  # fmt: skip


def memory_of(compiled: Any) -> Memory:
  """Returns the HBM of a chip that a `jax.stages.Compiled` takes."""
  m = compiled.memory_analysis()
  return Memory(
    m.argument_size_in_bytes,
    m.output_size_in_bytes - m.alias_size_in_bytes,
    m.temp_size_in_bytes,
    m.generated_code_size_in_bytes,
  )


def planned_memory(assignment: str) -> Memory:
  """Returns the HBM that the compiler plans before it makes machine code.

  The code itself and the scratch memory of its kernels are not known yet.

  Args:
    assignment: text of the compiler's buffer assignment.
  """
  sizes = {"arguments": 0, "outputs": 0, "temporaries": 0}
  for size, kind in re.findall(
    r"^allocation \d+: size (\d+), (.*):$", assignment, re.M
  ):
    if kind.startswith(("color", "thread-local", "constant")):
      continue  # other memories than HBM, scalars, and a few bytes
    if kind.startswith("parameter"):
      name = "arguments"
    else:
      name = "outputs" if "maybe-live-out" in kind else "temporaries"
    sizes[name] += int(size)
  return Memory(**sizes, code=0)
