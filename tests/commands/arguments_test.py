"""Options as flags: values, help texts and messages."""

import dataclasses

import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import arguments, cli, sample
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """Shared by two verbs."""

  count: int = option("images of each class", 2, unit="IMAGES", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Shared):
  out: str = option("written there", unit="FOLDER", group="output")
  texts: tuple[str, ...] | None = option("any number", None)
  share: float | None = option("10 % or so", None)
  mirror: bool = option("mirrored, too", True)
  fast: bool = option("quick", False)
  kind: str = option("one of two", "a", choices=("a", "b"))


def parse(*argv: str) -> Options:
  return arguments.parse(Options, "try", argv, "Tries.\n\nllamagen try --out=x\n")


def test_values_have_the_types_of_the_fields():
  assert parse("--out=x") == Options(out="x")
  found = parse("--out", "x", "--texts", "a b", "c", "--no-mirror", "--fast",
                "--count=3", "--share=0.5", "--kind=b")  # fmt: skip
  assert found == Options(
    out="x", texts=("a b", "c"), mirror=False, fast=True, count=3, share=0.5, kind="b"
  )


@pytest.mark.parametrize("argv, words", [
  ([], "--out is required"),
  (["--out=x", "--count=0"], "--count: 0: expected 1 or more"),
  (["--out=x", "--count=x"], "--count: 'x': expected a whole number"),
  (["--out=x", "--share=nan", "--coun=3"], "unknown flag --coun: did you mean --count"),
  (["--out=x", "--kind=c"], "--kind: invalid choice: 'c'"),
  (["--out=x", "more"], "unexpected argument 'more'"),
])  # fmt: skip
def test_mistakes_name_the_flag_in_one_line(argv, words):
  with pytest.raises(UserError) as error:
    parse(*argv)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_help_has_groups_units_defaults_and_examples(capsys):
  with pytest.raises(SystemExit):
    parse("--help")
  text = capsys.readouterr().out
  assert "output:\n  --out FOLDER" in text
  assert "Shared by two verbs:\n  --count IMAGES" in text
  assert "images of each class (default 2)" in text
  assert "10 % or so" in text
  assert text.rstrip().endswith("examples:\n  llamagen try --out=x")


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_of_every_verb_explains_every_flag(capsys, verb):
  if verb == "serve":
    pytest.importorskip("uvicorn")
  if verb == "prepare-captions":
    pytest.importorskip("pyarrow")
  with pytest.raises(SystemExit) as end:
    cli.run([verb, "--help"])
  assert end.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"usage: llamagen {verb} [flags]"
  assert any(line.startswith(f"  llamagen {verb}") for line in lines)
  for line, below in zip(lines, lines[1:], strict=False):
    if line.startswith("  --"):  # a flag, and its text behind or below it
      assert len(line.split("  ")) > 2 or below.startswith("   "), line


def test_flags_of_sampling_are_those_of_its_config():
  parser = arguments.make_parser(sample.Options, "sample", "Samples.")
  flags = {action.dest: action for action in parser._actions}
  for field in dataclasses.fields(SamplingConfig):
    assert flags[field.name].help == field.metadata["help"].replace("%", "%%")
    assert flags[field.name].default is None
