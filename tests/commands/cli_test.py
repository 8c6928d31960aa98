"""Commands as a user types them: what bad input prints, and the exit code."""

import errno
import importlib
import json
import shlex
import types

import numpy as np
from PIL import Image
import pytest

import llamagen_jax
from llamagen_jax.commands import arguments, cli, config_flag
from llamagen_jax.errors import RunFailed, Stopped, UserError
from tests import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Images, tokenizer, codes and transformer made by the verbs themselves."""
  folder = tmp_path_factory.mktemp("run")
  tiny.write_images(folder / "images")
  configs = {
    "tokenizer": tiny.tokenizer_config(folder / "images", 2),
    "gpt": tiny.gpt_config(folder / "codes", 2),
  }
  configs["gpt"].model.update(grid=8, vocab_size=16)
  for name, config in configs.items():
    tiny.write_config(folder / f"{name}.py", config)
  verbs = [
    f"train-tokenizer --config={folder}/tokenizer.py --workdir={folder}/tokenizer",
    f"extract-codes --tokenizer={folder}/tokenizer/bundle --shards=3 --image-size=16"
    f" --source=folder:{folder}/images --out={folder}/codes",
    f"train-gpt --config={folder}/gpt.py --workdir={folder}/gpt",
  ]
  for verb in verbs:
    assert cli.run(verb.split()) == 0, verb
  return folder


def llamagen(capsys, command: str) -> tuple[int, str]:
  capsys.readouterr()
  try:
    code = cli.run(command.split())
  except SystemExit as error:  # argparse
    code = error.code
  return code, capsys.readouterr().err


def sample(folder) -> str:
  return (
    f"sample --gpt={folder}/gpt/bundle --tokenizer={folder}/tokenizer/bundle"
    f" --out={folder}/drawn.png"
  )


@pytest.mark.parametrize(
  "error, code",
  [
    (None, 0),
    (RunFailed("loss is nan"), 1),
    (UserError("--x: no such flag"), 2),
    (Stopped("stopped at step 3 and saved; resume with the same command"), 75),
    (KeyboardInterrupt(), 75),
    (OSError(errno.ENOSPC, "No space left on device", "x.npz"), 1),
    (PermissionError(errno.EACCES, "Permission denied", "x.npz"), 2),
  ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
  def main(argv):
    if error is not None:
      raise error

  module = types.SimpleNamespace(main=main)
  monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
  assert cli.run(["sample"]) == code
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == (error is not None)
  assert all(line.startswith("llamagen sample: ") for line in lines)


def test_version_and_verbs(capsys):
  assert cli.run(["--version"]) == 0
  assert capsys.readouterr().out == f"llamagen_jax {llamagen_jax.__version__}\n"
  assert cli.run(["--help"]) == 0
  text = capsys.readouterr().out
  assert all(f"\n  {verb} " in text for verb in cli.VERBS)
  assert "75  stopped" in text


def examples(verb: str) -> list[list[str]]:
  """Returns the flags of each call of the verb in the text of its help."""
  module = importlib.import_module(f"llamagen_jax.commands.{cli.VERBS[verb][0]}")
  lines = module.__doc__.replace("\\\n", " ").splitlines()
  calls = [line for line in lines if line.startswith(f"llamagen {verb} ")]
  return [shlex.split(line, comments=True)[2:] for line in calls]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_examples_of_the_help_are_valid(verb, monkeypatch):
  class Parsed(Exception):
    pass

  parse = arguments.parse

  def parse_and_stop(*args):
    parse(*args)
    raise Parsed

  def stop(*args):
    raise Parsed

  monkeypatch.setattr(arguments, "parse", parse_and_stop)
  monkeypatch.setattr(config_flag, "load", stop)  # comes after the flags
  main = importlib.import_module(f"llamagen_jax.commands.{cli.VERBS[verb][0]}").main
  for flags in examples(verb):
    with pytest.raises(Parsed):
      main(flags)


def test_images_of_classes(trained, capsys):
  code, err = llamagen(capsys, f"{sample(trained)} --classes=0,3 --count=3 --top-k=5")
  assert code == 0, err
  with Image.open(trained / "drawn.png") as image:
    assert image.size == (3 * 18 - 2, 2 * 18 - 2)
  command = f"{sample(trained)} --classes=1,2 --count=2 --batch-size=3"
  arrays = []
  for seed in (1, 1, 2):
    out = trained / "drawn.npz"
    code, err = llamagen(capsys, f"{command} --seed={seed} --out={out}")
    assert code == 0, err
    arrays.append(np.load(out)["arr_0"])
  settings = json.loads((trained / "drawn.json").read_text())
  assert (settings["seed"], settings["count"], settings["image_size"]) == (2, 4, 16)
  assert len(settings["transformer"]) == len(settings["tokenizer"]) == 64
  assert arrays[0].shape == (4, 16, 16, 3)
  assert arrays[0].dtype == np.uint8
  np.testing.assert_array_equal(arrays[0], arrays[1])
  assert (arrays[0] != arrays[2]).any()


def test_a_file_of_classes_into_a_folder(trained, capsys):
  (trained / "classes.txt").write_text("class1\n0-1, 3\n")
  command = f"{sample(trained)} --classes-file={trained}/classes.txt --batch-size=3"
  code, err = llamagen(capsys, f"{command} --out={trained}/drawn")
  assert code == 0, err
  names = sorted(path.name for path in (trained / "drawn").iterdir())
  assert names == [
    "00000_class1.png", "00001_class0.png", "00002_class1.png", "00003_3.png",
  ]  # fmt: skip
  with Image.open(trained / "drawn" / names[0]) as image:
    assert image.size == (16, 16)


@pytest.mark.parametrize(
  "flags, words",
  [
    ("--classes=4", ["class 4 is out of range", "0 .. 3"]),
    ("--classes=cat", ["'cat'", "expected indices"]),
    ("--classes=1 --top-p=0", ["top_p=0.0: expected in (0, 1]"]),
    ("--classes=1 --top-p=1.2", ["top_p=1.2: expected in (0, 1]"]),
    ("--classes=1 --out=x.gif", ["--out=x.gif", ".png or .npz"]),
    ("--classes=1 --gpt=nowhere", ["nowhere: no config.json"]),
    ("--classes=1 --gpt={f}/tokenizer/bundle", ["kind 'tokenizer'", "expected 'gpt'"]),
    ("", ["one of --classes", "--prompts", "--fid-batch"]),
    ("--classes=1 --fid-batch=8", ["one of --classes"]),
    ("--classes-file=nowhere", ["--classes-file=nowhere: no such file"]),
    ("--classes=1 --count=0", ["--count", "1 or more"]),
    ("--classes=1 --tensor=3", ["'tensor': 3", "1 are here"]),
    ("--classes=clas1", ["class1 (1)"]),
    ("--fid-batch=8", ["drawn.png", "ends in .npz"]),
    ("--fid-batch=8 --out=x.npz --labels=all", ["--labels", "balanced"]),
    ("--classes=1 --png-folder=x", ["--png-folder goes with --fid-batch"]),
  ],
)
def test_bad_sample_commands(trained, capsys, flags, words):
  code, err = llamagen(capsys, f"{sample(trained)} {flags.format(f=trained)}")
  assert code == 2
  last = err.strip().splitlines()[-1]
  assert all(word in last for word in words), err
  assert "Traceback" not in err


@pytest.mark.parametrize(
  "command, words",
  [
    ("paint", ["no verb 'paint'", "train-gpt"]),
    (
      "train-gpt --config={f}/gpt.py --config.data.codes={f}/none --workdir={f}/x",
      ["{f}/none: no manifest.json (not found)"],
    ),
    (
      "train-gpt --config={f}/gpt.py --config.model.grid=4 --workdir={f}/x",
      ["{f}/codes: 8x8 codes an image", "expects 4x4: --config.model.grid=8"],
    ),
    (
      "train-gpt --config={f}/gpt.py --config.model.num_classes=1 --workdir={f}/x",
      ["label 1 is out of range", "--config.model.num_classes=2"],
    ),
    (
      "train-gpt --config={f}/gpt.py --config.mesh.data=3 --workdir={f}/x",
      ["'data': 3", "1 are here"],
    ),
    (
      "train-tokenizer --config={f}/tokenizer.py --config.data.source=folder:{f}/none"
      " --workdir={f}/x",
      ["folder:{f}/none: no such folder"],
    ),
    (
      "train-tokenizer --config={f}/tokenizer.py --config.loss.reconstruction=l3"
      " --workdir={f}/x",
      ["loss.reconstruction='l3'", "l1 or l2"],
    ),
    (
      "extract-codes --tokenizer={f}/tokenizer/bundle --source=folder:{f}/images"
      " --out={f}/codes --image-size=18",
      ["{f}/codes was begun with other settings", "image_size is 16 there, 18 here"],
    ),
    (
      "extract-codes --tokenizer={f}/tokenizer/bundle --source=folder:{f}/images"
      " --out={f}/x --image-size=17",
      ["17 is not a multiple", "downsampling 2"],
    ),
  ],
)
def test_bad_commands(trained, capsys, command, words):
  code, err = llamagen(capsys, command.format(f=trained))
  assert code == 2, err
  last = err.strip().splitlines()[-1]
  assert all(word.format(f=trained) in last for word in words), err
  assert not (trained / "x").exists()


def test_bad_images_are_skipped_named_and_limited(trained, tmp_path, capsys):
  images = tiny.write_images(tmp_path / "images", count=20)
  (images / "class1" / "03.png").write_bytes(b"broken")
  Image.new("RGB", (5, 40)).save(images / "class0" / "04.png")
  command = (
    f"extract-codes --tokenizer={trained}/tokenizer/bundle --source=folder:{images}"
    f" --out={tmp_path}/codes --image-size=16 --crops=center --shards=3"
  )
  code, err = llamagen(capsys, command)
  assert code == 2
  assert "bad images so far" in err.strip().splitlines()[-1]
  assert not (tmp_path / "codes" / "manifest.json").exists()
  code, err = llamagen(capsys, f"{command} --max-bad-share=0.1")
  assert code == 0, err
  from llamagen_jax.data.codes import CodeSource

  source = CodeSource(tmp_path / "codes")
  assert len(source) == 18
  assert all(source[i].label == int(source[i].key[5]) for i in range(18))
  skipped = [
    s for shard in source.manifest["shards"] for s in shard["skipped"].values()
  ]
  assert [s.split(":")[0] for s in skipped] == ["class0/04.png", "class1/03.png"]


def test_reconstructions_of_a_source(trained, capsys):
  command = (
    f"reconstruct --tokenizer={trained}/tokenizer/bundle --image-size=16 --shown=3"
    f" --source=folder:{trained}/images --out={trained}/kept --batch-size=5"
  )
  code, err = llamagen(capsys, command)
  assert code == 0, err
  metrics = json.loads((trained / "kept" / "metrics.json").read_text())
  assert {"psnr", "ssim", "ssim_lg", "usage", "perplexity"} <= metrics.keys()
  assert (metrics["images"], metrics["skipped"]) == (12, 0)
  kept = np.load(trained / "kept" / "reconstructions.npz")["arr_0"]
  originals = np.load(trained / "kept" / "originals.npz")["arr_0"]
  assert kept.shape == originals.shape == (12, 16, 16, 3)
  errors = np.mean((kept / 255 - originals / 255) ** 2, axis=(1, 2, 3))
  assert metrics["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-3)
  with Image.open(trained / "kept" / "reconstructions.png") as image:
    assert image.size == (3 * 18 - 2, 2 * 18 - 2)
