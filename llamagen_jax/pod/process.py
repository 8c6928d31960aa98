"""Compilation in a process of its own, which can be cut short.

libtpu prints pages about the TPU that is not there, reads the environment once, and
cannot be interrupted: none of that reaches this process.
"""

from collections.abc import Callable
import logging
import multiprocessing
from multiprocessing.connection import Connection
import os
import sys
import time
import traceback
from typing import Any, TextIO, TypeVar

import jax

from llamagen_jax.errors import RunFailed, UserError

T = TypeVar("T")
NEWS_SECONDS = 30


def run_apart(function: Callable[..., T], *args: Any, news: TextIO = sys.stderr) -> T:
  """Returns what a function returns in a fresh process.

  The function logs the stage it is in at level INFO. The stage and the seconds so far
  go to `news` when it changes and every half minute, and warnings as they come.

  Args:
    function: of a module, so that the process can import it.
    args: its arguments, which are pickled as its result is.
    news: stream for the lines.

  Raises:
    UserError: the function raised it.
    RunFailed: the function raised another error, or the process was killed.
  """
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  child = context.Process(target=_child, args=(theirs, function, args), daemon=True)
  child.start()
  theirs.close()
  stages = _Stages(news)
  try:
    while True:
      if not ours.poll(1.0):
        stages.remind()
        continue
      kind, value = ours.recv()
      if kind == "result":
        return value
      if kind == "refused":
        raise UserError(value)
      if kind == "failed":
        raise RunFailed(f"the compilation failed:\n{value}")
      stages.show(kind, value)
  except EOFError as error:
    child.join()
    raise RunFailed(
      f"the compiler's process ended with code {child.exitcode}; was memory short?"
    ) from error
  finally:
    child.kill()
    child.join()


class _Stages:
  """Says what the compiler is doing, and since when."""

  def __init__(self, news: TextIO):
    self._news = news
    self._start = self._since = self._said = time.monotonic()
    self._stage = "starting"

  def show(self, level: int, text: str) -> None:
    if level >= logging.WARNING:
      print(f"warning: {text}", file=self._news, flush=True)
      return
    self._stage, self._since = text, time.monotonic()
    self._print("")

  def remind(self) -> None:
    if time.monotonic() - self._said >= NEWS_SECONDS:
      self._print(f", for {time.monotonic() - self._since:.0f} s")

  def _print(self, since: str) -> None:
    self._said = time.monotonic()
    seconds = self._said - self._start
    print(f"{seconds:5.0f} s  {self._stage}{since}", file=self._news, flush=True)


class _Sender(logging.Handler):
  """Sends log records through a pipe."""

  def __init__(self, pipe: Connection):
    super().__init__(logging.INFO)
    self._pipe = pipe

  def emit(self, record: logging.LogRecord) -> None:
    self._pipe.send((record.levelno, record.getMessage()))


def _child(pipe: Connection, function: Callable, args: tuple) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  log = logging.getLogger("absl")
  log.addHandler(_Sender(pipe))
  log.setLevel(logging.INFO)
  # A program for chips that are not here cannot be read back (JAX 0.10.2).
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    pipe.send(("result", function(*args)))
  except UserError as error:
    pipe.send(("refused", str(error)))
  except Exception:
    pipe.send(("failed", traceback.format_exc()))
  pipe.close()
  os._exit(0)  # a compilation that was cut short goes on in a thread
