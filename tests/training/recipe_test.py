"""Configs become dataclasses, and everything wrong with them is said."""

import dataclasses

import pytest

from llamagen_jax import UserError
from llamagen_jax.training.optimizer import OptimizerConfig
from llamagen_jax.training.recipe import RunConfig, build, comments, parse_arg


@dataclasses.dataclass(frozen=True)
class Recipe:
  optimizer: OptimizerConfig
  # as long
  run: RunConfig  # as it takes
  size: int  # in pixels # of a side


def test_bare_words():
  parsed = parse_arg("XL,runlocal", variant="B", runlocal=False)
  assert (parsed.variant, parsed.runlocal) == ("XL", True)
  with pytest.raises(UserError, match="'XL'"):
    parse_arg("XL", runlocal=False)


def test_sections_must_fit_their_dataclass():
  assert build(OptimizerConfig, {"lr": 1.0}).lr == 1.0
  with pytest.raises(UserError, match="config.run: no field seed"):
    build(RunConfig, {"steps": 3}, "config.run")
  with pytest.raises(UserError, match="field wait_decay; did you mean weight_decay"):
    build(OptimizerConfig, {"lr": 1.0, "wait_decay": 2}, "config.optimizer")


def test_all_mistakes_of_a_config_come_at_once():
  with pytest.raises(UserError) as error:
    build(
      Recipe,
      {
        "optimizer": {"lr": "fast", "schedule": "sine"},
        "run": {"step": 3, "seed": 1},
        "size": 1.5,
      },
    )
  message = str(error.value)
  for words in (
    "config.optimizer.lr='fast': expected float",
    "config.run: unknown field step; did you mean steps?",
    "config.run: no field steps",
    "config.size=1.5: expected int",
  ):
    assert words in message, message


def test_comments_are_read_from_behind_and_above_a_field():
  assert comments(Recipe) == {
    "optimizer": "", "run": "as long as it takes", "size": "in pixels # of a side"
  }  # fmt: skip
