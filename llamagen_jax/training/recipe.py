"""Configs of the trainers: sections of a ConfigDict, and the dataclasses they become.

A config is a ConfigDict only until `build` turns its sections into dataclasses; from
there on every field has a type and a reader.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import inspect
import typing
from typing import Any, TypeVar

import ml_collections

from llamagen_jax.errors import UserError

T = TypeVar("T")
TRACKERS = ("wandb", "trackio")  # with the same functions init, log and finish
# Fields of `run` -> their least values.
LEAST = {
  "steps": 1, "log_every": 1, "eval_every": 0, "save_every": 1, "keep_last": 1,
  "keep_every": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 = the chips that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  slices: int = -1  # along `data`, joined by a data-center network; -1 = as chips say


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How long to train, and how often to log, evaluate and save."""

  steps: int
  seed: int
  log_every: int
  eval_every: int  # 0 = only at the end
  save_every: int
  keep_last: int  # newest checkpoints kept
  keep_every: int  # checkpoints at multiples of this are kept too; 0 = none
  tracker: str = "none"  # none | wandb | trackio; a package that shows runs, installed

  def __post_init__(self):
    for name, least in LEAST.items():
      if getattr(self, name) < least:
        raise UserError(f"run.{name}={getattr(self, name)}: expected {least} or more")
    if self.tracker not in ("none", *TRACKERS):
      raise UserError(
        f"run.tracker={self.tracker!r}: expected none or {' or '.join(TRACKERS)}"
      )


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
  """Parses a config file's argument, `L,image_size=384,runlocal`.

  A bare word switches on the boolean default of that name, or else is the value
  of `variant`. Values take the type of their default.
  """
  parsed = ml_collections.ConfigDict(defaults)
  for word in filter(None, (arg or "").split(",")):
    name, equals, value = word.partition("=")
    if not equals and isinstance(defaults.get(name), bool):
      parsed[name] = True
    elif not equals and "variant" in defaults:
      parsed.variant = name
    elif equals and name in defaults:
      try:
        parsed[name] = type(defaults[name])(value)
      except ValueError as error:
        kind = type(defaults[name]).__name__
        raise UserError(f"config argument {word!r}: expected {kind}") from error
    else:
      raise UserError(
        f"config argument {word!r}: expected one of {', '.join(defaults)}"
      )
  return parsed


def build(kind: type[T], section: Mapping[str, Any], where: str = "config") -> T:
  """Returns a section of the config as its dataclass.

  Fields that are dataclasses themselves are built from sections of their own.

  Raises:
    UserError: fields that are unknown, missing or of another type, or values that a
      dataclass refuses: all of them in one message.
  """
  problems: list[str] = []
  built = _build(kind, section, where, problems)
  if problems:
    raise UserError("; ".join(problems))
  return built


def _build(kind: type, section: Any, where: str, problems: list[str]) -> Any:
  """Returns the dataclass, or None after adding to the problems."""
  if not isinstance(section, Mapping | ml_collections.ConfigDict):
    problems.append(f"{where}={section!r}: expected a section")
    return None
  types, before = typing.get_type_hints(kind), len(problems)
  fields = {f.name: f for f in dataclasses.fields(kind)}
  for name, field in fields.items():
    if field.default is dataclasses.MISSING and name not in section:
      problems.append(f"{where}: no field {name}")
  values = {}
  for name, value in section.items():
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      hint = f"did you mean {near[0]}?" if near else f"its fields: {', '.join(fields)}"
      problems.append(f"{where}: unknown field {name}; {hint}")
    elif dataclasses.is_dataclass(types[name]):
      values[name] = _build(types[name], value, f"{where}.{name}", problems)
    elif not _fits(value, types[name]):
      problems.append(
        f"{where}.{name}={value!r}: expected {getattr(types[name], '__name__', '')}"
      )
    else:
      values[name] = value
  if len(problems) > before:
    return None
  try:
    return kind(**values)
  except UserError as error:
    text, section = str(error), where.rpartition(".")[2]
    named = where == "config" or text.startswith(section)
    problems.append(text if named else f"{where}: {text}")
    return None


def _fits(value: Any, kind: Any) -> bool:
  """Returns whether a value has a plain type; whole numbers are numbers, too."""
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return not isinstance(kind, type) or isinstance(value, kind)


def comments(kind: type) -> dict[str, str]:
  """Returns the help text or comment at each field of a dataclass, "" without one.

  A field's comment stands behind it, or in lines of its own above it.
  """
  fields = dataclasses.fields(kind)
  texts = {field.name: field.metadata.get("help", "") for field in fields}
  above: list[str] = []
  for line in inspect.getsource(kind).splitlines():
    code, _, comment = (part.strip() for part in line.partition("#"))
    name = code.partition(":")[0]
    if not code and comment:
      above.append(comment)
      continue
    if name in texts and ":" in code and not texts[name]:
      texts[name] = " ".join([*above, comment]).strip()
    above = []
  return texts


def one_line(error: object) -> str:
  """Returns an error's text without its line breaks."""
  return " ".join(str(error).split())
