"""Log lines on the terminal: our own from INFO up, those of libraries from WARNING."""

import logging
import pathlib
import sys

from absl import logging as absl_logging

PACKAGE = str(pathlib.Path(__file__).parent)
# Called for by us: clu writes the table of parameters with absl's logger.
OURS = (PACKAGE, "parameter_overview.py")


def show() -> None:
  """Prints log lines on stderr, above the progress bar if there is one."""
  handler = _Handler()
  handler.addFilter(_is_shown)
  handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  logging.root.handlers = [handler]
  absl_logging.set_verbosity(absl_logging.INFO)


def _is_shown(record: logging.LogRecord) -> bool:
  # Orbax 0.12 logs a failed save five times, four of them with a traceback, and asyncio
  # logs each task of it; the error itself is raised, and ends the run with one line.
  of_orbax = "/orbax/" in record.pathname or (
    record.name == "asyncio" and "/orbax/" in record.getMessage()
  )
  if of_orbax and record.levelno >= logging.ERROR:
    return False
  return record.levelno >= logging.WARNING or _is_ours(record)


def _is_ours(record: logging.LogRecord) -> bool:
  return record.pathname.startswith(OURS[0]) or record.pathname.endswith(OURS[1])


class _Handler(logging.Handler):
  """Writes a line without breaking a progress bar."""

  def emit(self, record: logging.LogRecord) -> None:
    text = self.format(record)
    bars = sys.modules.get("tqdm")  # not imported: no bar is there
    if bars is None:
      print(text, file=sys.stderr)
    else:
      bars.tqdm.write(text, file=sys.stderr)


class _Formatter(logging.Formatter):
  """`12:34:56 message`, with the level in front of it from WARNING up."""

  def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
    text = super().formatMessage(record)
    if record.levelno < logging.WARNING:
      return text
    return f"{record.levelname.lower()}: {text}"
