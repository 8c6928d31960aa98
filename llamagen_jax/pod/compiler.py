"""Compiles a program for chips that are not here, and counts what it does.

Nine tenths of the compiler's time go into machine code: register allocation and bundle
packing of every fusion (libtpu 0.0.42, two layers of B at 256: 7 of 80 CPU seconds for
all that comes before it on v5e, 7 of 130 on v6e). The optimised program and its plan of
memory are complete before that, so that a quick analysis stops there.
"""

import pathlib
import tempfile
import threading
from typing import Any

from absl import logging
import jax

from llamagen_jax.errors import UserError
from llamagen_jax.pod import hlo

# Endings of the files that the compiler writes, in their order.
PROGRAM = ".after_optimizations.txt"
MEMORY = ".after_optimizations-buffer-assignment.txt"
PLANNED = ".after_optimizations_after_buffer_assignment.txt"
POLL_SECONDS = 0.2


def analysed(lowered: jax.stages.Lowered, quick: bool = False) -> hlo.Analysis:
  """Compiles a program and counts what it does.

  Args:
    lowered: the program.
    quick: return as soon as the program and its memory are planned. The compilation
      goes on in the background: the process should end soon, see pod/process.py.

  Raises:
    UserError: the compiler cannot fit it into a chip's memory.
  """
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    compilation = _Compilation(lowered, pathlib.Path(folder))
    while not compilation.wait(POLL_SECONDS):
      if compilation.planned() and quick:
        return compilation.plan()
    return compilation.analysis()


class _Compilation:
  """A compilation in a thread of its own, which writes files into a folder."""

  def __init__(self, lowered: jax.stages.Lowered, folder: pathlib.Path):
    self._folder, self._planned = folder, False
    self._result: Any = None
    # jaxlib cannot read back every program, so the compiler writes them down.
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}

    def run() -> None:
      try:
        self._result = lowered.compile(options)
      except Exception as error:  # raised again by `analysis`
        self._result = error

    logging.info("optimising the program")
    self._thread = threading.Thread(target=run, daemon=True)
    self._thread.start()

  def wait(self, seconds: float) -> bool:
    """Returns whether the compilation has ended, after at most that time."""
    self._thread.join(seconds)
    return not self._thread.is_alive()

  def planned(self) -> bool:
    """Returns whether all but the machine code is there."""
    if not self._planned and self._written(PLANNED):
      self._planned = True
      logging.info("making machine code, which takes most of the time")
    return self._planned

  def plan(self) -> hlo.Analysis:
    memory = hlo.planned_memory(self._written(MEMORY)[0].read_text())
    return hlo.analyse_text(self._written(PROGRAM)[0].read_text(), memory, False)

  def analysis(self) -> hlo.Analysis:
    if isinstance(self._result, jax.errors.JaxRuntimeError):
      # The compiler gives up where no schedule fits a chip's memory.
      lines = [line for line in str(self._result).splitlines() if line.strip()]
      raise UserError(f"the compiler refuses: {' '.join(lines[:2])}") from self._result
    if isinstance(self._result, Exception):
      raise self._result
    # A program that comes out of JAX's cache of compilations is not written again.
    written = self._written(PROGRAM)
    text = written[0].read_text() if written else self._result.as_text()
    return hlo.analyse_text(text, hlo.memory_of(self._result))

  def _written(self, ending: str) -> list[pathlib.Path]:
    return list(self._folder.glob(f"*{ending}"))
