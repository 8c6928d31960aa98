"""`llamagen evaluate --sweep`: from a transformer to a curve of scores."""

import json

import numpy as np
from PIL import Image
import pytest

from llamagen_jax.commands import cli, sweep
from llamagen_jax.errors import UserError
from llamagen_jax.images import save_npz
from tests.sampling import fid_batch_test

saved = fid_batch_test.saved
COUNT = 9


@pytest.fixture
def run(saved, inception, cheap, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), np.uint8)
  save_npz(tmp_path / "reference.npz", [images], COUNT, None)

  def run(text, *flags):
    return cli.run([
      "evaluate", f"--sweep={text}", f"--gpt={saved / 'gpt'}",
      f"--tokenizer={saved / 'vq'}", f"--reference={tmp_path / 'reference.npz'}",
      "--protocol=custom", f"--count={COUNT}", "--batch-size=5", "--top-k=3",
      f"--inception={inception}", f"--cache={tmp_path / 'cache'}",
      f"--out={tmp_path / 'sweep'}", *flags,
    ])  # fmt: skip

  return run


@pytest.mark.slow
def test_a_sweep_and_a_longer_one(run, cheap, tmp_path, capsys):
  assert run("guidance=1.5:2:0.5") == 0
  folder, calls = tmp_path / "sweep", len(cheap)
  names = {"guidance-1.5", "guidance-2.0"}
  for name in names:
    result = json.loads((folder / f"{name}.scores.json").read_text())
    settings = result["settings"]["sampling"]
    assert settings["guidance_scale"] == float(name.partition("-")[2])
    assert settings["top_k"] == 3
  with Image.open(folder / "sweep.png") as image:
    assert image.width > 800
  before = {name: (folder / f"{name}.npz").read_bytes() for name in names}
  capsys.readouterr()

  assert run("guidance=1.5:2.5:0.5") == 0
  out = capsys.readouterr().out
  assert out.count("is finished already") == 2
  assert [line.split()[0] for line in out.splitlines()[-4:-1]] == ["1.5", "2", "2.5"]
  assert len(cheap) == calls + 1  # features of the third set alone
  assert before == {name: (folder / f"{name}.npz").read_bytes() for name in names}


def test_values_are_exact_and_both_ends_belong():
  setting, values = sweep.parse("guidance=1.5:2.25:0.25")
  assert setting == "guidance_scale"
  assert [str(value) for value in values] == ["1.50", "1.75", "2.00", "2.25"]
  assert [float(value) for value in sweep.parse("top-p=0.7:1:0.1")[1]] == [
    0.7, 0.8, 0.9, 1.0,
  ]  # fmt: skip
  for text in ("guidance", "guidance=1:2", "scale=1:2:1", "guidance=2:1:1",
               "guidance=1:2:0", "guidance=1:x:1", "guidance=1:nan:1"):  # fmt: skip
    with pytest.raises(UserError, match="NAME=START:STOP:STEP"):
      sweep.parse(text)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--guidance-scale=2"], "sets guidance_scale"),
    (["--samples=x.npz"], "no --samples"),
    (["--gpt="], "needs --gpt"),
    (["--protocol=gfid-adm-imagenet256"], "9 samples, expected 50000"),
    (["--protocol=gfid-adm-imagenet256"], "no mu and sigma"),
    (["--protocol=rfid-coco"], "not for samples of a transformer"),
    (["--inception=nowhere"], "--inception=nowhere: no such"),
  ],
)
def test_what_is_refused_before_the_work(run, tmp_path, capsys, flags, message):
  assert run("guidance=1:2:1", *flags) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "sweep").exists()


def test_the_published_curve():
  assert sweep.published("guidance", "c2i_B_256", "FID") == [(1, 26.26), (2, 5.46)]
  assert sweep.published("guidance", "c2i_L_384", "IS") == [(1, 64.3), (2, 256.1)]
  assert sweep.published("temperature", "c2i_B_256", "FID") == []
  assert sweep.published("guidance", None, "FID") == []
