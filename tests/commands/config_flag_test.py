"""`--config` and its overrides, as a user types them."""

import dataclasses
import textwrap

import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import cli, config_flag
from llamagen_jax.commands.train_gpt import Options
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build


@dataclasses.dataclass(frozen=True)
class Optimizer:
  lr: float
  clip: float = 1.0  # global norm


@dataclasses.dataclass(frozen=True)
class Recipe:
  optimizer: Optimizer
  variant: str
  size: int
  guard: Optimizer = Optimizer(2.0)


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
    textwrap.dedent("""
      import ml_collections
      from llamagen_jax.training.recipe import parse_arg

      def get_config(arg=None):
        arg = parse_arg(arg, variant="B", size=256, runlocal=False)
        return ml_collections.ConfigDict(
            {"optimizer": {"lr": 1e-4}, "variant": arg.variant, "size": arg.size})
      """)
  )
  return path


def parse(*argv: str):
  return config_flag.parse(Options, Recipe, "train-gpt", argv, "Trains.")


def test_arguments_overrides_and_defaults(config):
  options, found = parse(
    f"--config={config}:L,size=384", "--config.optimizer.lr=3e-4", "--workdir=w",
    "--config.guard.lr", "1", "--host=1",
  )  # fmt: skip
  assert found.to_dict() == {
    "optimizer": {"lr": 3e-4, "clip": 1.0}, "variant": "L", "size": 384,
    "guard": {"lr": 1.0, "clip": 1.0},
  }  # fmt: skip
  assert (options.workdir, options.host, options.profile) == ("w", 1, 0)


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config={c}", "--config.optimizer.lrr=1"],
     ["--config.optimizer.lrr: no such field", "mean --config.optimizer.lr?"]),
    (["--config={c}", "--config.lr=1"], ["--config.lr: no such field", ".lr?"]),
    (["--config={c}", "--config.zzz=1", "--config.q.qqq=2"],
     ["--config.zzz: no such field; config has ", "--config.q.qqq: "]),
    (["--config={c}", "--config.size.x=1"], ["did you mean --config.size?"]),
    (["--config={c}", "--config.optimizer.lr=x"], ["optimizer.lr", "'x'"]),
    (["--config={c}:size=x"], ["size=x", "expected int"]),
    (["--config={c}:colour=3"], ["colour=3", "variant, size, runlocal"]),
    (["--config={c}x"], ["{c}x", "no such file"]),
    (["--config={c}", "--workdirr=3"], ["unknown flag --workdirr", "--workdir?"]),
    (["--config={c}", "stray"], ["stray"]),
    ([], ["--config is required"]),
  ],
)  # fmt: skip
def test_typos_are_named_in_plain_english(config, argv, words):
  argv = [a.format(c=config) for a in argv]
  with pytest.raises(UserError) as error:
    parse(*argv, "--workdir=w")
  message = str(error.value)
  assert "\n" not in message and "\\" not in message
  assert all(word.format(c=config) in message for word in words), message


@pytest.mark.parametrize(
  "text, words",
  [
    ("def get_config(:", "invalid syntax"),
    ("x = 1", "no function get_config"),
    ("def get_config():\n  return 3", "returns int, expected a ConfigDict"),
  ],
)
def test_files_that_are_no_recipes(tmp_path, text, words):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(UserError, match=words):
    config_flag.load(str(tmp_path / "mine.py"))


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_flag.load("configs/c2i_digits.py:fast").run.steps == 5
  with pytest.raises(UserError, match=r"c2i_digit\.py: no such file.*c2i_imagenet"):
    config_flag.load("configs/c2i_digit.py")
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "c2i_digits.py").write_text(
    "import ml_collections\n\ndef get_config(arg):\n"
    "  return ml_collections.ConfigDict({'mine': arg})\n"
  )
  assert config_flag.load("configs/c2i_digits.py:fast").to_dict() == {"mine": "fast"}


def test_help_lists_the_recipes_and_their_arguments(capsys):
  with pytest.raises(SystemExit):
    cli.run(["train-tokenizer", "--help"])
  text = capsys.readouterr().out
  assert "configs/vq_folder.py: VQ tokenizer for one's own images" in text
  assert "`VQ-16` or `VQ-8`, `image_size=`" in text


def test_a_flag_may_turn_a_square_grid_into_rows_and_columns():
  argv = ["--config=configs/c2i_digits.py:fast", "--workdir=w"]
  for text, grid in (("4,8", (4, 8)), ("6", 6), ("5,5", 5)):
    flag = f"--config.model.grid={text}"
    _, found = config_flag.parse(
      Options, GPTRecipe, "train-gpt", [*argv, flag], "Trains."
    )
    assert build(GPTRecipe, found).model.grid == grid
  _, found = config_flag.parse(
    Options, GPTRecipe, "train-gpt", [*argv, "--config.model.grid=4x8"], "Trains."
  )
  with pytest.raises(UserError, match="^model.grid='4x8': expected a side or"):
    build(GPTRecipe, found)


def test_every_field_with_value_type_and_meaning(capsys):
  argv = ["train-gpt", "--config=configs/c2i_imagenet.py:L", "--help-config"]
  with pytest.raises(SystemExit) as end:
    cli.run([*argv, "--config.run.steps=7"])
  assert end.value.code == 0
  lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
  rows = {words[0]: words[1:] for words in lines if words[:1]}
  assert rows["--config.run.steps=7"] == ["int"]
  about = (
    "int | tuple[int, int] codes along a side of a square image, or (rows, columns)"
  )
  assert " ".join(rows["--config.model.grid=16"]) == about
  assert rows["--config.guard.skip_nonfinite=False"][0] == "bool"
  assert "guidance" in rows["--config.sampling.guidance_scale=1.75"][1]
