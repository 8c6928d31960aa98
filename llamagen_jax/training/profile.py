"""Traces a few steps of a run for XProf."""

import pathlib

from absl import logging
import jax

SETTLED = 3  # steps of a start that compile, or wait for what others compile


class Profile:
  """A trace of `steps` steps, begun once the run has settled; 0 traces nothing.

  Every host writes its own part under `folder`; `xprof --logdir` shows it. A run
  that ends before the trace does writes what there is.
  """

  def __init__(self, folder: pathlib.Path, steps: int, start: int):
    self._folder = folder
    self._turns = {start + SETTLED, start + SETTLED + steps} if steps else set()
    self._open = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error) -> None:
    if self._open:
      self.turn()

  def turns(self, step: int) -> bool:
    """Whether tracing begins or ends before this step, with all others finished."""
    return step in self._turns

  def turn(self) -> None:
    self._open = not self._open
    if self._open:
      jax.profiler.start_trace(str(self._folder))
    else:
      jax.profiler.stop_trace()
      logging.info("the trace is in %s", self._folder)
