"""The one argument parser: a dataclass of options -> flags, groups and help texts.

A verb's options are a frozen dataclass whose fields are made by `options.option`.
Options that several verbs share are a dataclass of their own, from which those of a
verb inherit; in the help they are a group under the first line of its docstring.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from typing import Any, NoReturn, TypeVar

from llamagen_jax.errors import UserError
from llamagen_jax.sides import PIXELS, Sides, read_pixels

T = TypeVar("T")


def parse(kind: type[T], verb: str, argv: Sequence[str], about: str) -> T:
  """Returns the options of a verb that its words on the command line name.

  Args:
    kind: the dataclass of options.
    verb: as it is typed, such as "sample".
    argv: the words after the verb.
    about: the help text; its paragraphs that begin with "llamagen" are examples.

  Raises:
    UserError: an unknown flag, a missing one, or a value that is not allowed.
    SystemExit: after `--help`.
  """
  parser = make_parser(kind, verb, about)
  args, rest = parser.parse_known_args(argv)
  refuse_unknown(parser, rest)
  return kind(**vars(args))


def make_parser(kind: type, verb: str, about: str) -> argparse.ArgumentParser:
  """Returns a parser with one flag for each field of a dataclass."""
  paragraphs = about.strip().split("\n\n")
  examples = [p for p in paragraphs if p.startswith("llamagen ")]
  parser = _Parser(
    f"llamagen {verb}",
    usage=f"llamagen {verb} [flags]",
    description="\n\n".join(p for p in paragraphs if p not in examples),
    epilog="examples:\n" + textwrap.indent("\n".join(examples), "  "),
    formatter_class=_Formatter,
    allow_abbrev=False,
    add_help=False,
  )
  groups: dict[str, Any] = {}
  hints = typing.get_type_hints(kind)
  for field, title in _titled(kind):
    if title not in groups:
      groups[title] = parser.add_argument_group(title)
    _add(groups[title], field, hints[field.name])
  parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
  return parser


def refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
  """Raises a UserError that names the first word, and the flag nearest to it."""
  if not words:
    return
  word = words[0].partition("=")[0]
  if not word.startswith("-"):
    raise UserError(f"unexpected argument {word!r}")
  known = [flag for action in parser._actions for flag in action.option_strings]
  near = difflib.get_close_matches(word, known, 1)
  hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
  raise UserError(f"unknown flag {word}: {hint}")


def _titled(kind: type) -> list[tuple[dataclasses.Field, str]]:
  """Fields with the titles of their groups: a verb's own first, then inherited ones."""
  own, inherited = [], []
  for field in dataclasses.fields(kind):
    owner = next(c for c in kind.__mro__ if field.name in inspect.get_annotations(c))
    title = field.metadata["group"]
    if owner is kind:
      own.append((field, title or "options"))
    else:
      inherited.append((field, title or _first_line(owner)))
  return own + inherited


def _first_line(kind: type) -> str:
  return (kind.__doc__ or "").partition("\n")[0].rstrip(".")


def _add(group: Any, field: dataclasses.Field, hint: Any) -> None:
  """Adds a field's flag, with its default at the end of the help text."""
  meta, flag = field.metadata, "--" + field.name.replace("_", "-")
  kind, several = _value_type(hint)
  required = field.default is dataclasses.MISSING
  default = None if required else field.default
  text = meta["help"].replace("%", "%%")
  if kind is bool:
    action = argparse.BooleanOptionalAction if default is not False else "store_true"
    text += " (default on)" if default else ""
    group.add_argument(flag, action=action, default=default, help=text)
    return
  if default not in (None, "", ()):
    text += f" (default {' '.join(map(str, default)) if several else default})"
  group.add_argument(
    flag,
    type=_reader(kind, meta["at_least"]),
    nargs="+" if several else None,
    action=_Several if several else "store",
    default=default,
    required=required,
    choices=meta["choices"] or None,
    metavar=None if meta["choices"] else (meta["unit"] or _placeholder(kind)).upper(),
    help=f"{text} (required)" if required else text,
  )


def _value_type(hint: Any) -> tuple[Callable[[str], Any], bool]:
  """`X | None` -> (X, False); `tuple[X, ...]` -> (X, True); `Sides` -> its reader."""
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
    hint = typing.Union[*(a for a in typing.get_args(hint) if a is not type(None))]
    if hint == Sides:
      return read_pixels, False
  if typing.get_origin(hint) is tuple:
    return typing.get_args(hint)[0], True
  return hint, False


def _placeholder(kind: Callable[[str], Any]) -> str:
  return {int: "N", float: "X"}.get(kind, "TEXT")


def _reader(kind: Callable[[str], Any], at_least: float | None) -> Callable[[str], Any]:
  """Returns the function that turns a word into a value, for argparse."""

  def read(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError as error:
      names = {int: "a whole number", float: "a number", read_pixels: PIXELS}
      expected = names.get(kind, kind.__name__)
      raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error
    if at_least is not None and not value >= at_least:
      raise argparse.ArgumentTypeError(f"{text}: expected {at_least:g} or more")
    return value

  return read


class _Several(argparse.Action):
  """Values after one flag or after several of it, in place of the default."""

  def __call__(self, parser, namespace, values, option_string=None):
    before = getattr(namespace, self.dest)
    before = () if before is self.default else before
    setattr(namespace, self.dest, (*before, *values))


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, printed where those of all verbs are."""

  def error(self, message: str) -> NoReturn:
    _, missing, names = message.partition("arguments are required: ")
    if missing:
      raise UserError(f"{names} {'are' if ',' in names else 'is'} required")
    raise UserError(message.removeprefix("argument "))


class _Formatter(argparse.RawDescriptionHelpFormatter):
  """Help with room for long flags."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=30, width=88)
