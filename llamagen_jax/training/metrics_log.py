"""What a run leaves to look at: metrics.jsonl, event files, a loss curve."""

from collections.abc import Mapping, Sequence
import importlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import uuid

from etils import epath
from matplotlib import figure
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import atomic_write, in_bucket, read_text, retry, write_text

TRACKED = "tracked_run.txt"  # the name of the run at its tracker
BUCKET_SECONDS = 60  # between two uploads of the rows to a bucket, which cannot append


class MetricsLog:
  """Writes rows of metrics for one run; made on host 0 only.

  A resumed run continues the file: rows of steps that are about to be redone
  are dropped, so a killed run's log equals an uninterrupted one's. In a bucket the
  files are written whole: the rows before every checkpoint and once a minute, the rest
  at every evaluation.
  """

  def __init__(self, workdir: os.PathLike, start: int, tracker: str = "none"):
    self._workdir = epath.Path(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._rows = [row for row in read_rows(self._path) if row["step"] <= start]
    self._bucket = in_bucket(workdir)
    self._events_folder = self._workdir
    if self._bucket:
      self._temporary = tempfile.TemporaryDirectory()
      self._events_folder = pathlib.Path(self._temporary.name)
    self._write_rows()
    self._tracker = _start_tracker(tracker, self._workdir, resumed=start > 0)
    self._events = _tensorboard().SummaryWriter(
      os.fspath(self._events_folder), purge_step=start + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds a row to metrics.jsonl and to the event files."""
    self._rows.append({"step": step, **metrics})
    if not self._bucket:
      with self._path.open("a") as file:
        file.write(json.dumps(self._rows[-1]) + "\n")
    elif time.monotonic() > self._written + BUCKET_SECONDS:
      self.flush()
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)
    if self._tracker is not None:
      self._tracker.log(dict(metrics), step=step)

  def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Adds a uint8 [H, W, 3] image to the event files."""
    self._events.add_image(name, pixels, step, dataformats="HWC")

  def flush(self) -> None:
    """Brings the rows in a bucket up to date."""
    if self._bucket:
      self._write_rows()

  def write_curve(self, names: Sequence[str]) -> None:
    """Writes loss.png, the named metrics of all rows against the step, one panel each.

    Brings the other files in a bucket up to date, too.
    """
    self._upload()
    names = [name for name in names if any(name in row for row in self._rows)]
    if not names:
      return
    sheet = figure.Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    panels = sheet.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
      points = [(row["step"], row[name]) for row in self._rows if name in row]
      steps, values = zip(*points, strict=True)
      axes.plot(steps, values, linewidth=0.8, alpha=0.5)
      axes.plot(steps, _smooth(values), linewidth=1.6)
      axes.set(xlabel="step", title=name)
      axes.grid(alpha=0.3)
    with atomic_write(self._workdir / "loss.png") as file:
      sheet.savefig(file, dpi=120, format="png")

  def close(self) -> None:
    """Ends the event files."""
    if self._tracker is not None:
      self._tracker.finish()
    self._events.close()
    self._upload()
    if self._bucket:
      self._temporary.cleanup()

  def _write_rows(self) -> None:
    write_text(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
    self._written = time.monotonic()

  def _upload(self) -> None:
    if self._bucket:
      self._write_rows()
      self._events.flush()
      for path in self._events_folder.iterdir():
        with atomic_write(self._workdir / path.name) as file:
          file.write(path.read_bytes())


def _tensorboard():
  """Returns tensorboardX, imported as if there were no torch.

  It imports torch where that is installed, though nothing here needs it: 2.5 of the
  4.6 s that a training verb took to start (tensorboardX 2.6.5, torch 2.13).
  """
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
  try:
    return importlib.import_module("tensorboardX")
  finally:
    if hidden:
      del sys.modules["torch"]


def _start_tracker(name: str, workdir: epath.Path, *, resumed: bool):
  """Returns the package that shows runs, begun or resumed; None for "none".

  A file in the workdir keeps the name of the run, so that a resumed one is the same.
  """
  if name == "none":
    return None
  try:
    tracker = importlib.import_module(name)
  except ImportError as error:
    raise UserError(f"run.tracker={name!r} is not installed: pip install {name}") from (
      error
    )
  path = workdir / TRACKED
  if not (resumed and path.exists()):
    write_text(path, f"{workdir.name}-{uuid.uuid4().hex[:8]}")
  run = read_text(path)
  same = {"id": run} if name == "wandb" else {}  # trackio knows runs by their names
  tracker.init(project="llamagen_jax", name=run, resume="allow", **same)
  return tracker


def read_rows(path: os.PathLike) -> list[dict[str, float]]:
  """Returns the rows of a metrics.jsonl; a line that a kill cut short ends the file."""
  rows, path = [], epath.Path(path)
  if path.exists():
    for line in retry(path.read_text).splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


def _smooth(values: Sequence[float]) -> list[float]:
  """Returns an exponential average over about a fiftieth of the curve."""
  decay = math.exp(-50 / max(len(values), 50))
  smoothed, average = [], values[0]
  for value in values:
    average = decay * average + (1 - decay) * value
    smoothed.append(average)
  return smoothed
