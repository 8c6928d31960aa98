"""Traces a few steps of a run for XProf."""

import os

from absl import logging
import jax

from llamagen_jax.storage import local_path

SETTLED = 3  # first steps of a start, which compile or wait for a compilation


class Profile:
  """Traces `steps` steps once the first ones have compiled; 0 traces nothing.

  Every host writes its own files under `folder`; `xprof --logdir` shows them. A run
  that ends within the trace writes it up to there.
  """

  def __init__(self, folder: os.PathLike, steps: int, start: int):
    self._folder = local_path(folder, "--profile: the trace") if steps else folder
    self._turns = {start + SETTLED, start + SETTLED + steps} if steps else set()
    self._open = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error) -> None:
    if self._open:
      self.turn()

  def turns(self, step: int) -> bool:
    """Returns whether tracing begins or ends before this step."""
    return step in self._turns

  def turn(self) -> None:
    """Begins the trace, or ends it; all earlier steps are finished."""
    self._open = not self._open
    if self._open:
      jax.profiler.start_trace(str(self._folder))
    else:
      jax.profiler.stop_trace()
      logging.info("the trace is in %s", self._folder)
