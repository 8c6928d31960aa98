"""Fields of dataclasses that are also flags: each carries its own help text."""

from collections.abc import Sequence
import dataclasses
from typing import Any


def option(
  text: str,
  default: Any = dataclasses.MISSING,
  *,
  unit: str = "",
  choices: Sequence[str] = (),
  at_least: float | None = None,
  group: str = "",
) -> Any:
  """Returns a dataclass field that a command line shows as a flag.

  Args:
    text: the help text; it says what a default of None or "" stands for.
    default: the value if the flag is not given; a field without one is required.
    unit: shown in place of the value in the help: images, pixels, seconds, FOLDER.
    choices: the values that are allowed.
    at_least: the smallest number that is allowed.
    group: title of the flags in the help that belong together.
  """
  metadata = {
    "help": text,
    "unit": unit,
    "choices": tuple(choices),
    "at_least": at_least,
    "group": group,
  }
  return dataclasses.field(default=default, metadata=metadata)
