"""`quickstart --folder` on images with transparency, of ten classes."""

import functools
import types
from unittest import mock

from absl import logging
import numpy as np
from PIL import Image, ImageDraw
import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import budget, cli, quickstart_folder
from llamagen_jax.commands.budget import Choices
from llamagen_jax.data.sources import NO_LABEL, open_source

HIDDEN = (255, 200, 0, 0)  # the colour below what is transparent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """64-pixel RGBA images: a disc of its class's colour on nothing; and some junk."""
  folder = tmp_path_factory.mktemp("own") / "images"
  rng = np.random.default_rng(0)
  for label in range(10):
    (folder / f"class {label}").mkdir(parents=True)
    for index in range(20):
      image = Image.new("RGBA", (64, 64), HIDDEN)
      x, y = rng.integers(24, 40, 2)
      box = [x - 20, y - 20, x + 20, y + 20]
      ImageDraw.Draw(image).ellipse(box, fill=(25 * label, 0, 250 - 25 * label))
      image.save(folder / f"class {label}" / f"{index}.png")
  (folder / "class 3" / "broken.png").write_bytes(b"no image")
  (folder / ".thumbnails").mkdir()
  return folder


def test_copies_are_opaque_split_and_of_every_class(images, tmp_path):
  choices = Choices(tmp_path, {"images": str(images), "minutes": 20.0})
  size = quickstart_folder.write_images(tmp_path / "images", str(images), choices, 5000)
  assert size == 64
  keys = {}
  for split, count in (("train", 180), ("val", 20)):
    source = open_source(f"folder:{tmp_path}/images/{split}")
    assert len(source) == count
    assert source.class_names == tuple(f"class {i}" for i in range(10))
    keys[split] = {source[i].key.rpartition("/")[2] for i in range(count)}
  assert not keys["train"] & keys["val"]
  with Image.open(next((tmp_path / "images/train/class 0").iterdir())) as image:
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_large_images_become_small_and_flat_folders_one_class(tmp_path):
  for index in range(12):
    path = tmp_path / "flat" / f"{index}.jpg"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (600, 400), (0, 20 * index, 0)).save(path)
  choices = Choices(tmp_path, {"images": "flat", "minutes": 20.0})
  folder = tmp_path / "images"
  assert quickstart_folder.write_images(folder, f"{tmp_path}/flat", choices, 5000) == 64
  source = open_source(f"folder:{folder}/train")
  assert (source.class_names, len(source)) == (("images",), 11)
  with Image.open(next((folder / "train/images").iterdir())) as image:
    assert image.size == (120, 80)  # room for crops of 64


def test_every_class_gives_as_many_images_as_it_can():
  labels = np.array([0] * 50 + [1] * 3 + [2] * 500 + [NO_LABEL] * 7)
  splits = quickstart_folder.split(labels, most=100)
  rows = np.concatenate(list(splits.values()))
  assert len(set(rows)) == len(rows)
  assert np.bincount(labels[rows]).tolist() == [48, 3, 49]
  assert np.bincount(labels[splits["val"]]).tolist() == [4, 0, 4]


def test_too_few_images_are_refused(tmp_path):
  Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
  choices = Choices(tmp_path / "w", {"images": "x", "minutes": 20.0})
  with pytest.raises(UserError, match="1 usable images, expected at least 8"):
    quickstart_folder.write_images(tmp_path / "w" / "i", str(tmp_path), choices, 5000)


def test_choices_are_made_once_and_for_one_folder(tmp_path):
  assert (
    Choices(tmp_path, {"images": "a", "minutes": 20.0}).get("steps", lambda: 7) == 7
  )
  assert (
    Choices(tmp_path, {"images": "a", "minutes": 20.0}).get("steps", lambda: 8) == 7
  )
  with pytest.raises(UserError, match="images=a, not b"):
    Choices(tmp_path, {"images": "b", "minutes": 20.0})
  with pytest.raises(UserError, match=r"minutes=20\.0, not 5\.0"):
    Choices(tmp_path, {"images": "a", "minutes": 5.0})


@pytest.mark.parametrize("seconds, steps", [
  (2.0, 178),  # 0.85 of 35 % of 20 minutes
  (1000.0, budget.FEWEST_STEPS),
  (1e-3, quickstart_folder.MOST_STEPS["tokenizer"]),
])  # fmt: skip
def test_a_training_takes_its_share_of_the_time(monkeypatch, seconds, steps):
  monkeypatch.setattr(budget, "seconds_a_step", lambda _: seconds)
  stream = types.SimpleNamespace(source=range(10**6), batch_size=32)
  task = types.SimpleNamespace(stream=stream)
  assert quickstart_folder._steps("tokenizer", task, 20.0) == steps


def test_flags_that_do_not_go_together(tmp_path, capsys):
  for flag in ("--text", "--fast"):
    command = ["quickstart", "--folder=x", flag, f"--workdir={tmp_path}/w"]
    assert cli.run(command) == 2
    assert "--folder has no" in capsys.readouterr().err
  assert cli.run(["quickstart", f"--folder={tmp_path}/x", f"--workdir={tmp_path}/w"])
  assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_folder_to_samples_and_a_rerun_does_nothing(
  images, tmp_path, caplog, request, monkeypatch
):
  monkeypatch.setattr(budget, "FEWEST_STEPS", 2)
  monkeypatch.setattr(budget, "TIMED_STEPS", 1)
  caplog.set_level("INFO")
  logger = logging.get_absl_logger()
  request.addfinalizer(functools.partial(logger.setLevel, logger.level))
  logging.set_verbosity(logging.INFO)  # as the command line does
  workdir = tmp_path / "mine"
  flags = [f"--folder={images}", "--minutes=0.1", f"--workdir={workdir}"]
  assert cli.run(["quickstart", *flags]) == 0
  for words in ("201 images of 10 classes",
                "8x8 codes of a codebook of 64", "4 layers of width 128",
                "compiling the train step"):  # fmt: skip
    assert words in caplog.text
  with Image.open(workdir / "samples.png") as image:
    assert image.size[0] == 10 * 66 - 2
  written = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.*")}
  written.pop(workdir / "choices.json")
  assert cli.run(["quickstart", *flags]) == 0
  again = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.*")}
  again.pop(workdir / "choices.json")
  assert again == written


def test_codes_and_samples_go_where_the_next_step_looks(images, tmp_path, monkeypatch):
  """The steps around the trainings, with stand-ins for the models."""
  called = mock.create_autospec(quickstart_folder.extract)
  monkeypatch.setattr(quickstart_folder, "extract", called)
  monkeypatch.setattr(quickstart_folder, "Encoder", lambda folder: folder)
  choices = Choices(tmp_path, {"images": str(images), "minutes": 20.0})
  quickstart_folder.write_images(tmp_path / "images", str(images), choices, 5000)
  quickstart_folder._extract(tmp_path, "val", 64)
  (encoder, source, spec, out, crops), settings = called.call_args
  assert encoder == tmp_path / "tokenizer" / "bundle"
  assert (len(source), spec) == (20, f"folder:{tmp_path}/images/val")
  assert out == tmp_path / "codes" / "val"
  assert (crops.sides, len(crops.names), settings["max_bad_share"]) == (64, 5, 0.05)

  config = types.SimpleNamespace(num_classes=20)
  gpt = types.SimpleNamespace(config=config, class_names=("a", "b"))
  monkeypatch.setattr(quickstart_folder.bundle, "load_gpt", lambda folder: gpt)
  monkeypatch.setattr(quickstart_folder.bundle, "load_tokenizer", lambda folder: None)
  asked = mock.create_autospec(quickstart_folder.sample)
  asked.return_value = np.zeros((80, 32, 32, 3), np.uint8)
  monkeypatch.setattr(quickstart_folder, "sample", asked)
  quickstart_folder.write_samples(tmp_path)
  assert asked.call_args.kwargs["classes"] == [*range(0, 20, 2)] * 8
  with Image.open(tmp_path / "samples.png") as image:
    assert image.width == 10 * 66 - 2  # twice the size of 32 pixels
