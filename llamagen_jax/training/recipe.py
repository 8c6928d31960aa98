"""The trainers' command line: a config file, overrides, and a work folder.

`--config=configs/c2i_imagenet.py:L,image_size=384 --config.optimizer.lr=3e-4`.
A config is a ConfigDict of sections only until `build` turns a section into the
dataclass that the code uses; from there on every field has a type and a reader.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.resources
import pathlib
import re
import typing
from typing import Any, TypeVar

from absl import flags
from etils import epath
import ml_collections
from ml_collections import config_flags

from llamagen_jax.errors import UserError
from llamagen_jax.parallel import hosts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 = the chips that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


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


@dataclasses.dataclass(frozen=True)
class Command:
  """A parsed command line of a trainer."""

  config: ml_collections.ConfigDict
  workdir: epath.Path  # local, or gs://
  init_from: str  # where a fresh run takes its weights from; "" = nowhere
  profile: int  # steps to trace


def parse_command(verb: str, argv: Sequence[str]) -> Command:
  """Parses `--config=FILE[:ARG] [--config.x.y=VALUE ...] --workdir=DIR`.

  `--init-from=DIR` names another run or a bundle that a fresh run starts from,
  `--profile=N` traces N steps.
  With them come the flags of several hosts, which are joined here.
  """
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, logs and the bundle.", flag_values=values
  )
  flags.DEFINE_string(
    "init-from",
    "",
    "Run or bundle whose weights a fresh run starts from, at step 0.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "profile",
    0,
    "Steps to trace for XProf, into the workdir's folder profile.",
    0,
    flag_values=values,
  )
  hosts.define_flags(values)
  config = parse_config(verb, argv, values, required=("workdir",))
  hosts.initialize_distributed(values)
  return Command(
    config, epath.Path(values.workdir), values["init-from"].value, values.profile
  )


def parse_config(
  verb: str, argv: Sequence[str], values: flags.FlagValues, required: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Parses `--config` with its overrides, and the flags that `values` defines.

  `configs/x.py` is found from any folder: it is also installed with the package.

  Raises:
    UserError: a flag that is unknown or missing, or a field that no config has.
  """
  argv = [_installed(word) for word in argv]
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with its argument after a colon.",
    flag_values=values,
    sys_argv=[verb, *argv],
  )
  flags.DEFINE_bool("help", False, "Show this help.", flag_values=values)
  try:
    rest = values([verb, *argv])[1:]
  except (AttributeError, KeyError) as error:  # a typo in an override
    raise UserError(f"config has no field {_one_line(error.args[0])}") from error
  except (flags.Error, OSError, SyntaxError) as error:
    raise UserError(_one_line(error)) from error
  if values.help:
    print(f"llamagen {verb}\n{values.get_help()}")
    raise SystemExit(0)
  if rest:
    raise UserError(f"unexpected argument {rest[0]!r}")
  for name in ("config", *required):
    if values[name].value is None:
      raise UserError(f"--{name} is required")
  if not isinstance(values.config, ml_collections.ConfigDict):
    file = config_flags.get_config_filename(values["config"])
    raise UserError(
      f"--config={file}: no such file, or get_config() gives no ConfigDict"
    )
  return values.config


def _installed(word: str) -> str:
  """`--config=configs/x.py:ARG` where there is no such file -> that of the package."""
  found = re.fullmatch(r"(--?config=|)configs/(\w+\.py)(:.*|)", word)
  if not found or pathlib.Path("configs", found[2]).exists():
    return word
  recipe = importlib.resources.files("llamagen_jax.configs") / found[2]
  return f"{found[1]}{recipe}{found[3]}" if recipe.is_file() else word


def _one_line(error: object) -> str:
  return " ".join(str(error).split())


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
  """A section of the config -> its dataclass; a field too many is an error.

  Fields that are dataclasses themselves are built from sections of their own.
  """
  types = typing.get_type_hints(kind)
  defaults = {f.name: f.default for f in dataclasses.fields(kind)}
  unknown = [name for name in section if name not in defaults]
  missing = [
    name
    for name, default in defaults.items()
    if default is dataclasses.MISSING and name not in section
  ]
  if unknown or missing:
    problem = f"unknown field {unknown[0]}" if unknown else f"no field {missing[0]}"
    raise UserError(f"{where}: {problem}; its fields are {', '.join(defaults)}")
  values = {}
  for name, value in section.items():
    nested = dataclasses.is_dataclass(types[name])
    values[name] = build(types[name], value, f"{where}.{name}") if nested else value
  return kind(**values)
