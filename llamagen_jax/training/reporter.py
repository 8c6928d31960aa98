"""What a run shows while it goes on: progress bar, log rows, curves, images."""

import dataclasses
import os
import time

from absl import logging
from etils import epath
import jax
import numpy as np
from PIL import Image
import tqdm

from llamagen_jax.errors import RunFailed
from llamagen_jax.images import save_png
from llamagen_jax.training.metrics_log import MetricsLog
from llamagen_jax.training.recipe import RunConfig
from llamagen_jax.training.speed import Work, memory, speed

CHECKED = ("loss", "norm")  # a metric whose name ends so has to be finite


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The metrics of an evaluation, and images by name: uint8 [H, W, 3]."""

  metrics: dict[str, float]
  images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Reporter:
  """Logs every step of a run, and ends it where a number is not finite."""

  def __init__(
    self,
    workdir: os.PathLike,
    run: RunConfig,
    start: int,
    batch_size: int,
    curves: tuple[str, ...],
    max_skipped_in_a_row: int,
  ):
    self._workdir, self._run, self._curves = epath.Path(workdir), run, curves
    self._batch_size, self._max_skipped = batch_size, max_skipped_in_a_row
    self._main = jax.process_index() == 0
    self._log = MetricsLog(workdir, start, run.tracker) if self._main else None
    self._bar = tqdm.tqdm(
      total=run.steps,
      initial=start,
      desc=self._workdir.name,
      unit="step",
      dynamic_ncols=True,
      disable=not self._main,
    )
    self._last = (start, time.perf_counter())
    self._waited, self._done = 0.0, Work(0, 0.0)

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, kind, *_) -> None:
    self._bar.close()
    if self._main:
      try:
        self._log.write_curve(self._curves)
        self._log.close()
      except OSError as error:  # a full disk: the run's own error says more
        if kind is None:
          raise RunFailed(f"{self._workdir}: {error}") from error

  def flush(self) -> None:
    """Makes the rows of all steps last, as a checkpoint of the newest one will."""
    if self._main:
      self._log.flush()

  def log(
    self,
    step: int,
    metrics: dict[str, jax.Array],
    waited: float,
    work: Work | None,
    last_good: int | None,
  ) -> None:
    """Checks the metrics of a step, and writes a row where one is due.

    Args:
      step: how many updates were done with it.
      metrics: of the step.
      waited: seconds for its batch.
      work: of the step, where it is known.
      last_good: step of the newest checkpoint, for the message.

    Raises:
      RunFailed: a loss or a norm is not finite, or too many steps were skipped.
    """
    self._check(step, metrics, last_good)
    self._bar.update()
    self._waited += waited
    if work is not None:
      self._done = Work(self._done.tokens + work.tokens, self._done.flops + work.flops)
    if step % self._run.log_every and step != self._run.steps:
      return
    now, (last_step, last_time) = time.perf_counter(), self._last
    elapsed = now - last_time
    row = {name: float(value) for name, value in metrics.items()}
    row["step_seconds"] = elapsed / (step - last_step)
    row["steps_per_second"] = (step - last_step) / elapsed
    row["samples_per_second"] = row["steps_per_second"] * self._batch_size
    row["data_wait"] = self._waited / elapsed
    if self._done.tokens:
      row |= speed(self._done, elapsed)
    row |= memory(jax.local_devices()[0])
    self._last, self._waited, self._done = (step, now), 0.0, Work(0, 0.0)
    self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
    if self._main:
      self._write(self._log.write, step, row)

  def _check(
    self, step: int, metrics: dict[str, jax.Array], last_good: int | None
  ) -> None:
    skipped = int(metrics.get("skipped_in_a_row", 0))
    if skipped:
      loss = float(metrics["loss"])
      logging.warning("step %d skipped, loss %s; %d in a row", step, loss, skipped)
      if skipped >= self._max_skipped:
        raise RunFailed(
          f"{skipped} steps in a row were skipped, the last is {step}, loss {loss}"
        )
      return
    for name in (name for name in metrics if name.endswith(CHECKED)):
      if not np.isfinite(value := float(metrics[name])):
        good = "none was saved" if last_good is None else f"step {last_good}"
        raise RunFailed(
          f"{name} is {value} at step {step}; last good checkpoint in"
          f" {self._workdir}: {good}"
        )

  def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
    """Writes metrics and images of an evaluation, and the curves up to here."""
    if not self._main:
      return
    metrics = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
    self._write(self._log.write, step, metrics)
    for name, image in evaluation.images.items():
      self._write(self._log.write_image, step, name, image)
      save_png(self._workdir / f"{name}.png", Image.fromarray(image))
    self._write(self._log.write_curve, self._curves)
    shown = "  ".join(f"{name} {v:.4g}" for name, v in evaluation.metrics.items())
    self._bar.write(f"step {step}  {shown}")

  def _write(self, write, *args) -> None:
    """Calls a function of the log; a full disk ends the run in one line."""
    try:
      write(*args)
    except OSError as error:
      raise RunFailed(
        f"the log in {self._workdir} cannot be written: {error}"
      ) from error
