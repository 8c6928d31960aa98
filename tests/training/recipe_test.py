import textwrap

import pytest

from llamagen_jax import UserError
from llamagen_jax.training.optimizer import OptimizerConfig
from llamagen_jax.training.recipe import RunConfig, build, parse_arg, parse_command


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


def test_arguments_and_overrides(config):
  argv = [f"--config={config}:L,size=384", "--config.optimizer.lr=3e-4", "--workdir=w"]
  command = parse_command("train", argv)
  assert command.config.to_dict() == {
    "optimizer": {"lr": 3e-4}, "variant": "L", "size": 384,
  }  # fmt: skip
  assert str(command.workdir) == "w"


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config={c}", "--config.optimizer.lrr=1"], ["lrr", 'Did you mean "lr"']),
    (["--config={c}", "--config.optimizer.lr=x"], ["optimizer.lr", "'x'"]),
    (["--config={c}:size=x"], ["size=x", "expected int"]),
    (["--config={c}:colour=3"], ["colour=3", "variant, size, runlocal"]),
    (["--config={c}x"], ["{c}x", "no such file"]),
    (["--config={c}", "--workdirr=3"], ["workdirr"]),
    (["--config={c}", "stray"], ["stray"]),
    ([], ["--config is required"]),
  ],
)
def test_typos_are_named(config, argv, words):
  argv = [a.format(c=config) for a in argv]
  with pytest.raises(UserError) as error:
    parse_command("train", [*argv, "--workdir=w"])
  message = str(error.value)
  assert "\n" not in message
  assert all(word.format(c=config) in message for word in words), message


def test_bare_words():
  parsed = parse_arg("XL,runlocal", variant="B", runlocal=False)
  assert (parsed.variant, parsed.runlocal) == ("XL", True)
  with pytest.raises(UserError, match="'XL'"):
    parse_arg("XL", runlocal=False)


def test_sections_must_fit_their_dataclass():
  assert build(OptimizerConfig, {"lr": 1.0}).lr == 1.0
  with pytest.raises(UserError, match="config.run: no field seed"):
    build(RunConfig, {"steps": 3}, "config.run")
  with pytest.raises(UserError, match="config.optimizer: unknown field decay"):
    build(OptimizerConfig, {"lr": 1.0, "decay": 2}, "config.optimizer")


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  argv = ["--config=configs/c2i_digits.py:fast", "--config.data.codes=c", "--workdir=w"]
  config = parse_command("train", argv).config
  assert (config.run.steps, config.data.codes) == (5, "c")
  with pytest.raises(UserError, match=r"--config=configs/c2i_digit\.py: no such file"):
    parse_command("train", ["--config=configs/c2i_digit.py", "--workdir=w"])
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "c2i_digits.py").write_text(
    "import ml_collections\n\ndef get_config(arg):\n"
    "  return ml_collections.ConfigDict({'mine': arg})\n"
  )
  argv = ["--config", "configs/c2i_digits.py:fast", "--workdir=w"]
  assert parse_command("train", argv).config.to_dict() == {"mine": "fast"}
