"""`llamagen reconstruct --protocol`: from a tokenizer and images to rFID."""

import json

import jax
import numpy as np
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.evaluation.protocols import PROTOCOLS, Protocol
from llamagen_jax.images import resize_bicubic
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rfid")
  tiny.write_images(folder / "images", COUNT)
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  bundle.save_tokenizer(folder / "vq", tiny.TOKENIZER, params)
  return folder


def reconstruct(folder, out, *flags):
  return cli.run([
    "reconstruct", f"--tokenizer={folder / 'vq'}", f"--out={folder / out}",
    f"--source=folder:{folder / 'images'}", "--image-size=16", "--batch-size=4",
    f"--cache={folder / 'cache'}", *flags,
  ])  # fmt: skip


@pytest.mark.slow
def test_from_images_to_rfid(folder, inception, capsys, monkeypatch):
  small = Protocol("", COUNT, 8, COUNT, None, True, "rFID", ("FID", "sFID"))
  monkeypatch.setitem(PROTOCOLS, "rfid-coco", small)
  flags = ("--protocol=rfid-coco", f"--inception={inception}")
  assert reconstruct(folder, "a", *flags) == 0
  printed = capsys.readouterr().out
  result = json.loads((folder / "a" / "scores.json").read_text())
  assert f"rFID        {result['scores']['rFID']['ours']:10.5g}" in printed
  assert result["settings"]["image_size"] == 16 and not result["mismatches"]
  for name in ("originals", "reconstructions"):
    assert np.load(folder / "a" / f"{name}.npz")["arr_0"].shape == (COUNT, 8, 8, 3)
  assert not list((folder / "a").glob(".*"))

  # Two verbs one after the other find the same.
  files = [f"--samples={folder}/a/reconstructions.npz",
           f"--reference={folder}/a/originals.npz"]  # fmt: skip
  out = folder / "again.json"
  again = ["evaluate", *files, *flags, f"--out={out}", f"--cache={folder / 'cache'}"]
  assert cli.run(again) == 0
  assert json.loads(out.read_text())["scores"] == result["scores"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--protocol=rfid-coco"], "needs --inception"),
    (["--protocol=gfid-adm-imagenet256", "--inception=x"], "have an rFID"),
    (["--protocol=rfid-coco", "--inception=x"], "has 12 images, expected 5000"),
  ],
)
def test_what_is_refused_before_the_work(folder, capsys, flags, message):
  assert reconstruct(folder, "b", *flags) == 2
  assert message in capsys.readouterr().err
  assert not (folder / "b").exists()


def test_larger_images_are_scored_at_the_protocols_side(tmp_path):
  from llamagen_jax.commands.reconstruct import _ImageFile

  images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
  file = _ImageFile(16)
  file.add(images)
  (found,) = file.batches()
  expected = np.asarray(resize_bicubic(images.astype(np.float32), 16))
  assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.5001
