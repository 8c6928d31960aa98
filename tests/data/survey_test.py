"""Sizes that are chosen from the data."""

from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.sources import open_source
from llamagen_jax.data.survey import Survey, held_out_beside, survey


@pytest.mark.parametrize("sides, size", [
  ((20, 24, 31), 32), ((63, 64, 500), 64), ((100, 127, 127), 64),
  ((128, 128, 200), 128),
  ((64, 3000, 4000), 256),
])  # fmt: skip
def test_half_of_the_images_have_the_size(sides, size):
  assert Survey(3, (), sides).image_size == size


@pytest.mark.parametrize("images, codes, rows", [
  (10, 64, 64), (1000, 64, 64), (5000, 64, 512), (50_000, 64, 4096),
  (1_281_167, 256, 16384),
])  # fmt: skip
def test_the_codebook_grows_with_the_images(images, codes, rows):
  assert Survey(images, (), (64,)).codebook_size(codes) == rows


def test_headers_are_read_and_broken_images_passed_over(tmp_path):
  for name, side in (("b/0", 40), ("b/1", 50), ("a/2", 60)):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (99, side)).save(tmp_path / f"{name}.png")
  (tmp_path / "a" / "3.png").write_bytes(b"no image")
  spec = f"folder:{tmp_path}"
  assert survey(open_source(spec), spec) == Survey(4, ("a", "b"), (40, 50, 60))


def test_nothing_readable_is_said(tmp_path):
  (tmp_path / "x.png").write_bytes(b"no image")
  spec = f"folder:{tmp_path}"
  with pytest.raises(UserError, match=r"none of 1 images can be read, such as x\.png"):
    survey(open_source(spec), spec)


def test_held_out_folder_beside_train(tmp_path):
  for name in ("train", "test", "mine"):
    (tmp_path / name).mkdir()
  assert held_out_beside(f"{tmp_path}/train") == f"{tmp_path}/test"
  assert held_out_beside(f"{tmp_path}/mine") == f"{tmp_path}/mine"
