"""What the compiler's output says about a program on a pod."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.chips import Chip
from llamagen_jax.pod import hlo

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompileReport:
  """What a chip of the pod does in one run of a program."""

  chip: Chip
  chips: int
  model_flops: float  # of the run, on one chip
  found: hlo.Analysis

  @property
  def hbm(self) -> int:
    """Bytes of HBM that are taken at the peak."""
    return self.found.memory.total

  @property
  def fits(self) -> bool:
    return self.hbm <= self.chip.hbm_bytes

  @property
  def seconds(self) -> dict[str, float]:
    """Least time of a run by resource; exchanges in one ring, both directions."""
    sent = sum(c.sent for c in self.found.collectives)
    return {
      "compute": self.found.flops / self.chip.peak_flops,
      "HBM": self.found.bytes / self.chip.hbm_bandwidth,
      "ICI": sent / (2 * self.chip.link_bandwidth),
    }

  @property
  def bottleneck(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  @property
  def least_seconds(self) -> float:
    return self.seconds[self.bottleneck]

  @property
  def mfu(self) -> float:
    """Model FLOP/s utilisation if the bottleneck resource were used to the full."""
    return self.model_flops / self.chip.peak_flops / self.least_seconds

  def lines(self) -> list[str]:
    """The verdict for the user."""
    m = self.found.memory
    over = (self.hbm - self.chip.hbm_bytes) / GIB
    silent = self.found.silent_kernels
    unsaid = f"; {silent} runs of kernels not counted" if silent else ""
    lines = [
      f"{self.chips} x {self.chip.name}",
      f"HBM a chip      arguments {m.arguments / GIB:.2f}, temporaries"
      f" {m.temporaries / GIB:.2f}, total {self.hbm / GIB:.2f} of"
      f" {self.chip.hbm_bytes / GIB:.0f} GiB:"
      f" {'fits' if self.fits else f'over by {over:.2f}'}",
      f"FLOPs a chip    {self.found.flops:.3g},"
      f" {self.found.flops / self.model_flops:.2f} x the model's"
      f" {self.model_flops:.3g}{unsaid}",
      f"bytes a chip    {self.found.bytes / 1e9:.2f} GB",
    ]
    for c in self.found.collectives:
      lines.append(
        f"  {c.kind:20} {c.count:5} among {c.group}: {c.sent / 1e6:.1f} MB sent,"
        f" the largest of {c.largest / 1e6:.1f} MB"
      )
    return [*lines, f"least ms        {self.times}"]

  @property
  def times(self) -> str:
    times = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in self.seconds.items())
    return f"{times}: {self.bottleneck} binds"

  def figures(self) -> dict[str, Any]:
    """The verdict as numbers."""
    return {
      "chip": self.chip.name,
      "chips": self.chips,
      "fits": self.fits,
      "hbm": self.hbm,
      "memory": dataclasses.asdict(self.found.memory),
      "flops": self.found.flops,
      "model_flops": self.model_flops,
      "bytes": self.found.bytes,
      "silent_kernels": self.found.silent_kernels,
      "collectives": [
        dataclasses.asdict(c) | {"sent": c.sent} for c in self.found.collectives
      ],
      "seconds": self.seconds,
      "mfu": self.mfu,
    }


def analysed(lowered: jax.stages.Lowered) -> hlo.Analysis:
  """Compiles a program and counts what it does.

  Raises:
    UserError: the compiler cannot place it.
  """
  with tempfile.TemporaryDirectory() as folder:
    # The compiler writes its program down, because jaxlib cannot read all of them.
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
      # The compiler gives up where no schedule fits a chip's memory.
      lines = [line for line in str(error).splitlines() if line.strip()]
      raise UserError(f"the compiler refuses: {' '.join(lines[:2])}") from error
    written = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
    # What comes out of JAX's cache of compilations is not written again.
    text = written[0].read_text() if written else compiled.as_text()
  return hlo.analyse_text(text, hlo.memory_of(compiled))
