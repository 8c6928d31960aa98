"""What a run leaves behind to look at: metrics.jsonl, event files, a loss curve."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib

from matplotlib import figure
import numpy as np
import tensorboardX


class MetricsLog:
  """Writes rows of metrics for one run; made on host 0 only.

  A resumed run continues the file: rows of steps that are about to be redone
  are dropped, so a killed run's log equals an uninterrupted one's.
  """

  def __init__(self, workdir: pathlib.Path, start: int):
    self._path = workdir / "metrics.jsonl"
    rows = [row for row in read_rows(self._path) if row["step"] <= start]
    part = self._path.with_name(".metrics.jsonl.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(self._path)
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)

  def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Adds a uint8 [H, W, 3] image to the event files."""
    self._events.add_image(name, pixels, step, dataformats="HWC")

  def draw_curve(self, path: pathlib.Path, names: Sequence[str]) -> None:
    """Draws the named metrics of all rows against the step, one panel each."""
    rows = read_rows(self._path)
    names = [name for name in names if any(name in row for row in rows)]
    if not names:
      return
    sheet = figure.Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    panels = sheet.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
      points = [(row["step"], row[name]) for row in rows if name in row]
      steps, values = zip(*points, strict=True)
      axes.plot(steps, values, linewidth=0.8, alpha=0.5)
      axes.plot(steps, _smooth(values), linewidth=1.6)
      axes.set(xlabel="step", title=name)
      axes.grid(alpha=0.3)
    part = path.with_name(f".{path.name}.part")
    sheet.savefig(part, dpi=120, format="png")
    part.replace(path)

  def close(self) -> None:
    self._events.close()


def read_rows(path: pathlib.Path) -> list[dict[str, float]]:
  """The rows of a metrics.jsonl; a line that a kill cut short ends the file."""
  rows = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


def _smooth(values: Sequence[float]) -> list[float]:
  """Exponential average over about a fiftieth of the curve."""
  decay = math.exp(-50 / max(len(values), 50))
  smoothed, average = [], values[0]
  for value in values:
    average = decay * average + (1 - decay) * value
    smoothed.append(average)
  return smoothed
