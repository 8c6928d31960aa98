"""`llamagen edit`, from files to files."""

import numpy as np
from PIL import Image
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.commands.edit import parse_borders
from llamagen_jax.sampling.edit import Borders
from tests.sampling import fid_batch_test

saved = fid_batch_test.saved
SIDE = fid_batch_test.SIDE


@pytest.fixture(scope="module")
def files(saved):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
  hidden = np.zeros((SIDE, SIDE), np.uint8)
  hidden[:, 4:] = 255
  Image.fromarray(pixels).save(saved / "image.png")
  Image.fromarray(pixels).resize((9, 12)).save(saved / "high.png")
  Image.fromarray(hidden).save(saved / "white.png")
  clear = Image.fromarray(pixels)
  clear.putalpha(Image.fromarray(255 - hidden))
  clear.save(saved / "clear.png")
  return saved


def edit(files, *flags) -> int:
  return cli.run([
    "edit", f"--gpt={files / 'gpt'}", f"--tokenizer={files / 'vq'}", "--classes=1",
    *flags,
  ])  # fmt: skip


def pixels(path) -> np.ndarray:
  return np.asarray(Image.open(path))


def test_white_and_transparent_masks_are_alike(files, tmp_path):
  image, out = f"--image={files / 'image.png'}", tmp_path / "out"
  for name in ("white", "clear"):
    assert edit(files, image, f"--mask={files / name}.png", f"--out={out}/{name}") == 0
  assert edit(files, f"--image={files / 'clear.png'}", f"--out={out}/own.png") == 0
  found = pixels(out / "white" / "00000.png")
  np.testing.assert_array_equal(found, pixels(out / "clear" / "00000.png"))
  np.testing.assert_array_equal(found, pixels(out / "own.png"))
  np.testing.assert_array_equal(found[:, :3], pixels(files / "image.png")[:, :3])


def test_variations_of_an_image_of_another_size(files, tmp_path, capsys):
  flags = [f"--image={files / 'high.png'}", "--count=3", "--strength=0.5"]
  assert edit(files, *flags, "--out=x.png") == 2
  error = capsys.readouterr().err
  assert "9x12 pixels, the model draws 6x6" in error and error.count("\n") == 1
  for fit in ("crop", "resize"):
    out = tmp_path / f"{fit}.npz"
    assert edit(files, *flags, f"--fit={fit}", f"--out={out}") == 0
    assert np.load(out)["arr_0"].shape == (3, SIDE, SIDE, 3)


def test_outpainting_by_the_command_line(files, tmp_path):
  out = tmp_path / "wide.png"
  flags = [f"--image={files / 'image.png'}", "--outpaint=left=2,right=4"]
  assert edit(files, *flags, f"--out={out}") == 0
  np.testing.assert_array_equal(pixels(out)[:, 2:-4], pixels(files / "image.png"))


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--image=none.png"], "--image=none.png: no such file"),
    (["--image=IMAGE", "--mask=none.png"], "--mask=none.png: no such file"),
    (["--image=VQ"], "vq/config.json: cannot be decoded"),
    (["--image=IMAGE", "--mask=HIGH"], "the mask is 9x12 pixels, the image 6x6"),
    (["--image=IMAGE", "--outpaint=up=3"], "--outpaint=up=3: expected left=PIXELS"),
    (["--image=IMAGE", "--outpaint=left=2", "--strength=0.3"], "--strength at 1"),
    (["--image=IMAGE", "--strength=2"], "strength=2.0: expected 0 .. 1"),
    (["--image=IMAGE", "--order=known-first"], "learned raster order only"),
    (["--image=IMAGE", "--out=x.jpg"], "ends in .png or .npz, or a folder"),
  ],
)
def test_mistakes_are_one_line(files, flags, words, capsys):
  places = {"IMAGE": "image.png", "HIGH": "high.png", "VQ": "vq/config.json"}
  for word, name in places.items():
    flags = [flag.replace(word, str(files / name)) for flag in flags]
  out = [] if any(flag.startswith("--out=") for flag in flags) else ["--out=x.png"]
  assert edit(files, *flags, *out) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1


def test_borders_are_read():
  assert parse_borders("left=64, bottom=8") == Borders(left=64, bottom=8)
  assert parse_borders("") == Borders()
