"""The report on a program that was compiled for a pod."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from llamagen_jax.parallel.chips import Chip
from llamagen_jax.pod.hlo import Analysis

GIB = 2**30
Row = tuple[str, str]  # label and value


@dataclasses.dataclass(frozen=True)
class CompileReport:
  """What a chip of the pod does in one run of a program."""

  chip: Chip
  chips: int
  slices: int
  model_flops: float  # of the run, on one chip
  analysis: Analysis
  # A program that runs before every run of this one, and whose arguments stay in HBM.
  before: "CompileReport | None" = None
  # Rows and figures that only programs of its kind have.
  more_rows: tuple[Row, ...] = ()
  more_figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def hbm(self) -> int:
    """Bytes of HBM that are taken at the peak."""
    m = self.analysis.memory
    if self.before is None:
      return m.total
    b = self.before.analysis.memory
    return max(m.total + b.arguments, b.total + m.arguments)

  @property
  def fits(self) -> bool:
    return self.hbm <= self.chip.hbm_bytes

  @property
  def seconds(self) -> dict[str, float]:
    """Least time of a run by resource; exchanges in one ring, both directions."""
    sent = {"ICI": 0.0, "DCN": 0.0}
    for collective in self.analysis.collectives:
      sent[collective.network] += collective.sent
    times = {
      "compute": self.analysis.flops / self.chip.peak_flops,
      "HBM": self.analysis.bytes / self.chip.hbm_bandwidth,
      "ICI": sent["ICI"] / (2 * self.chip.link_bandwidth),
    }
    if self.slices > 1:
      times["DCN"] = sent["DCN"] / self.chip.dcn_bandwidth
    return times

  @property
  def bottleneck(self) -> str:
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def least_seconds(self) -> float:
    """Least time of a run, with that of the program before it."""
    before = self.before.least_seconds if self.before else 0.0
    return self.seconds[self.bottleneck] + before

  @property
  def mfu(self) -> float:
    """Model FLOP/s utilisation if the bottleneck resource were used to the full."""
    return self.model_flops / self.chip.peak_flops / self.least_seconds

  def with_more(self, rows: list[Row], figures: Mapping[str, Any]) -> "CompileReport":
    """Returns this report with rows and figures of its kind of program."""
    return dataclasses.replace(self, more_rows=tuple(rows), more_figures=figures)

  def rows(self) -> list[Row]:
    """Returns the report as labels and values."""
    m, a = self.analysis.memory, self.analysis
    over = (self.hbm - self.chip.hbm_bytes) / GIB
    silent = f"; {a.silent_kernels} runs of kernels not counted"
    slices = f" in {self.slices} slices" if self.slices > 1 else ""
    code = "" if a.machine_code else ", scratch memory of kernels not counted"
    return [
      ("chips", f"{self.chips} x {self.chip.name}{slices}"),
      (
        "HBM a chip",
        f"arguments {m.arguments / GIB:.2f}, temporaries {m.temporaries / GIB:.2f},"
        f" total {self.hbm / GIB:.2f} of {self.chip.hbm_bytes / GIB:.0f} GiB:"
        f" {'fits' if self.fits else f'over by {over:.2f}'}{code}",
      ),
      (
        "FLOPs a chip",
        f"{a.flops:.3g}, {a.flops / self.model_flops:.2f} x the model's"
        f" {self.model_flops:.3g}{silent if a.silent_kernels else ''}",
      ),
      ("bytes a chip", f"{a.bytes / 1e9:.2f} GB"),
      *(
        (
          f"  {c.kind}",
          f"{c.count} among {c.group} {'slices' if c.network == 'DCN' else 'chips'}:"
          f" {c.sent / 1e6:.1f} MB sent, the largest of {c.largest / 1e6:.1f} MB",
        )
        for c in a.collectives
      ),
      ("least ms", self.times),
      *self.more_rows,
    ]

  @property
  def times(self) -> str:
    times = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in self.seconds.items())
    return f"{times}: {self.bottleneck} is the bottleneck"

  def figures(self) -> dict[str, Any]:
    """Returns the report as numbers, for JSON."""
    a = self.analysis
    return {
      "chip": self.chip.name,
      "chips": self.chips,
      "slices": self.slices,
      "fits": self.fits,
      "hbm": self.hbm,
      "memory": dataclasses.asdict(a.memory),
      "machine_code": a.machine_code,
      "flops": a.flops,
      "model_flops": self.model_flops,
      "bytes": a.bytes,
      "silent_kernels": a.silent_kernels,
      "collectives": [dataclasses.asdict(c) | {"sent": c.sent} for c in a.collectives],
      "seconds": self.seconds,
      "least_seconds": self.least_seconds,
      "mfu": self.mfu,
      "before": self.before.figures() if self.before else None,
      **self.more_figures,
    }


def as_text(rows: list[Row]) -> str:
  """Returns labels and values as lines of two columns."""
  return "\n".join(f"{label:22}{value}" for label, value in rows)
