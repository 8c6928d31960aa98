"""A trainer's config: `--config=FILE[:ARG]` and `--config.section.field=VALUE`.

The file's `get_config(ARG)` returns a ConfigDict. Sections and fields that it leaves
out take the defaults of the recipe's dataclasses, so that a flag can set any of them.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import importlib.resources
import importlib.util
import pathlib
import re
import types
import typing
from typing import TypeVar

from absl import flags
import ml_collections
from ml_collections import config_flags

from llamagen_jax.commands import arguments
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.training.recipe import comments, one_line

T = TypeVar("T", bound="ConfigOptions")
OVERRIDE = re.compile(r"--?config\.([\w.]+)(=.*)?", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigOptions:
  """Config; --config.SECTION.FIELD=VALUE sets a field of it."""

  config: str = option(
    "recipe: a Python file, with its argument after a colon", unit="FILE[:ARG]"
  )
  help_config: bool = option(
    "print every field of the config with its value and meaning, and stop", False
  )


def parse(
  kind: type[T], recipe: type, verb: str, argv: Sequence[str], about: str
) -> tuple[T, ml_collections.ConfigDict]:
  """Returns a verb's options and its config with the overrides applied.

  Args:
    kind: dataclass of the verb's options.
    recipe: dataclass that the config is for; its defaults complete the config.
    verb: as it is typed, such as "train-gpt".
    argv: the words after the verb.
    about: description and examples for the help.

  Raises:
    UserError: a flag or a field that does not exist, or a value of another type.
    SystemExit: after `--help` and `--help-config`.
  """
  about = f"{about.strip()}\n\n{shipped()}"
  parser = arguments.make_parser(kind, verb, about)
  for action in parser._actions:  # a look at the config needs no work folder
    action.required &= "--help-config" not in argv or action.dest == "config"
  args, rest = parser.parse_known_args(argv)
  overrides, others = _split(rest)
  arguments.refuse_unknown(parser, others)
  config = load(args.config)
  complete(config, recipe)
  _override(config, overrides)
  if args.help_config:
    print("\n".join(describe(config, recipe)))
    raise SystemExit(0)
  return kind(**vars(args)), config


def load(text: str) -> ml_collections.ConfigDict:
  """Returns what `get_config` of a recipe returns, for `FILE` or `FILE:ARG`.

  `configs/x.py` is found from any folder: it is also installed with the package.
  """
  name, colon, arg = text.partition(":")
  file = pathlib.Path(name).expanduser()
  if not file.exists() and re.fullmatch(r"configs/\w+\.py", name):
    recipes = importlib.resources.files("llamagen_jax.configs")
    file = pathlib.Path(str(recipes / file.name))
    if not file.exists():
      shipped = sorted(p.name for p in recipes.iterdir() if p.name[0] not in "_.")
      raise UserError(
        f"--config={name}: no such file; these come with llamagen_jax:"
        f" {', '.join(f'configs/{recipe}' for recipe in shipped)}"
      )
  spec = importlib.util.spec_from_file_location("recipe", file)
  if spec is None or not file.is_file():
    raise UserError(f"--config={name}: no such file, expected a recipe such as x.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f"--config={name}: {one_line(error)}") from error
  if not hasattr(module, "get_config"):
    raise UserError(f"--config={name}: the file has no function get_config")
  config = module.get_config(arg) if colon else module.get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"--config={name}: get_config returns {type(config).__name__}, expected a"
      " ConfigDict"
    )
  return config


def shipped() -> str:
  """Returns a paragraph: the package's recipes and their arguments."""
  lines = ["recipes, and what may stand after the colon:"]
  recipes = importlib.resources.files("llamagen_jax.configs").iterdir()
  for file in sorted(recipes, key=lambda file: file.name):
    if file.name.endswith(".py") and not file.name.startswith("_"):
      tree = ast.parse(file.read_text("utf-8"))
      about = (ast.get_docstring(tree) or "").partition("\n")[0]
      functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
      arguments_of = ast.get_docstring(functions["get_config"]) or ""
      lines += [f"  configs/{file.name}: {about}", f"    {one_line(arguments_of)}"]
  return "\n".join(lines)


def complete(config: ml_collections.ConfigDict, recipe: type) -> None:
  """Fills in, in place, the fields of a recipe that have defaults."""
  hints = typing.get_type_hints(recipe)
  for field in dataclasses.fields(recipe):
    kind = hints[field.name]
    has_default = field.default is not dataclasses.MISSING
    if dataclasses.is_dataclass(kind):
      if field.name not in config and has_default:
        config[field.name] = dataclasses.asdict(field.default)
      elif isinstance(config.get(field.name), ml_collections.ConfigDict):
        complete(config[field.name], kind)
    elif field.name not in config and has_default:
      config[field.name] = field.default
    elif field.name in config and isinstance(kind, types.UnionType):
      # Else a flag could only give a value of the type that the recipe's value has.
      config[field.name] = ml_collections.FieldReference(config[field.name], object)


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """Words that argparse leaves -> values of config fields, and all other words."""
  overrides, others, words = {}, [], list(words)
  while words:
    word = words.pop(0)
    found = OVERRIDE.fullmatch(word)
    if not found:
      others.append(word)
    elif found[2] is not None:
      overrides[found[1]] = found[2][1:]
    elif words and not words[0].startswith("--"):
      overrides[found[1]] = words.pop(0)
    else:
      overrides[found[1]] = "true"
  return overrides, others


def _override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
  """Sets fields in place, each from text by the type of its value so far."""
  unknown = [_unknown(config, path) for path in overrides]
  if any(unknown):
    raise UserError("; ".join(filter(None, unknown)))
  words = [f"--config.{path}={value}" for path, value in overrides.items()]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    "config", config.lock(), "", flag_values=values, sys_argv=["", *words]
  )
  try:
    values(["", *words])
  except (flags.Error, ValueError, TypeError) as error:
    raise UserError(one_line(error)) from error
  config.unlock()


def _unknown(config: ml_collections.ConfigDict, path: str) -> str:
  """Says which field is meant in place of one that does not exist; "" if it does."""
  section, names, place = config, path.split("."), "config"
  for name in names:
    if not isinstance(section, ml_collections.ConfigDict) or name not in section:
      break
    section, place = section[name], f"{place}.{name}"
  else:
    return ""
  known = [p for p, _ in _leaves(config)]
  same_name = [p for p in known if p.rpartition(".")[2] == names[-1]]
  near = same_name or difflib.get_close_matches(path, known, 1)
  if near:
    return f"--config.{path}: no such field, did you mean --config.{near[0]}?"
  if not isinstance(section, ml_collections.ConfigDict):
    return f"--config.{path}: no such field, {place} is a value"
  return f"--config.{path}: no such field; {place} has {', '.join(section)}"


def _leaves(config: ml_collections.ConfigDict, at: str = "") -> Iterator[tuple]:
  """Yields (path, value) of all fields that are not sections."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f"{at}{name}.")
    else:
      yield at + name, value


def describe(
  config: ml_collections.ConfigDict, recipe: type, at: str = "--config"
) -> Iterator[str]:
  """Yields lines: each field of a recipe with its value, type and comment."""
  hints, texts = typing.get_type_hints(recipe), comments(recipe)
  fields = dataclasses.fields(recipe)
  for field in sorted(fields, key=lambda f: dataclasses.is_dataclass(hints[f.name])):
    kind, text = hints[field.name], texts[field.name]
    if dataclasses.is_dataclass(kind):
      section = config.get(field.name, ml_collections.ConfigDict())
      about = (kind.__doc__ or "").partition("\n")[0]
      plain = about if not about.startswith(f"{kind.__name__}(") else ""
      yield f"\n{field.name}: {text or plain}".rstrip(": ")
      yield from describe(section, kind, f"{at}.{field.name}")
    else:
      value = config.get(field.name, "(required)")
      flag = f"{at}.{field.name}={value}"
      name = getattr(kind, "__name__", str(kind))
      yield f"  {flag:46} {name:6} {text}".rstrip()
