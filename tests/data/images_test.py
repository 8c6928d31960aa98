import io

import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.images import (
  BadImage,
  CropSet,
  TrainingImage,
  center_crop,
  decode,
  random_crop,
)
from llamagen_jax.data.sources import ImageRecord, open_source
from llamagen_jax.images import to_uint8
from tests import parity


def png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return file.getvalue()


def noise(seed: int, height: int, width: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
  for name in ("b/2.png", "b/1.JPEG", "a/3.png", "a/notes.txt"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(noise(len(name), 20, 24)))
  return tmp_path


def test_classes_are_the_sorted_folders(folder):
  source = open_source(f"folder:{folder}")
  assert source.class_names == ("a", "b")
  assert [(s.key, s.label) for s in source] == [
    ("a/3.png", 0), ("b/1.JPEG", 1), ("b/2.png", 1),
  ]  # fmt: skip


def test_a_flat_folder_has_no_labels(folder):
  source = open_source(f"folder:{folder}/b")
  assert source.class_names == ()
  assert [s.label for s in source] == [-1, -1]


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_missing_and_empty_folders_are_named(tmp_path, place):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=f"folder:{tmp_path / place}: no "):
    open_source(f"folder:{tmp_path / place}")


def test_unknown_kinds_of_source_are_named():
  with pytest.raises(UserError, match="'tape:x': expected"):
    open_source("tape:x")


@pytest.mark.parametrize(
  "image, why",
  [
    (b"not an image", "cannot be decoded"),
    (png(noise(0, 64, 64))[:200], "cannot be decoded"),
    (png(noise(0, 40, 12)), "12x40, smaller than 16"),
  ],
)
def test_bad_images_say_why(image, why):
  with pytest.raises(BadImage, match=f"x.png: {why}"):
    decode(ImageRecord("x.png", image), min_side=16)


def test_a_bad_image_is_replaced_and_counted(folder):
  (folder / "a" / "3.png").write_bytes(b"broken")
  source = open_source(f"folder:{folder}")
  transform = TrainingImage(source, 16, 1.25, mirror=True, min_side=16)
  made = [transform(s, np.random.default_rng(1)) for s in source]
  assert [m["replaced"] > 0 for m in made] == [True, False, False]
  assert all(m["image"].shape == (16, 16, 3) for m in made)


def test_random_crops_come_in_all_sizes_and_places():
  # An image of its own coordinates shows where a crop was taken and how large.
  y, x = np.mgrid[0:100, 0:200]
  image = Image.fromarray(np.stack([y * 2, x, 0 * x], axis=-1).astype(np.uint8))
  rng = np.random.default_rng(0)
  crops = [random_crop(image, 50, 1.25, rng) for _ in range(200)]
  assert all(c.shape == (50, 50, 3) for c in crops)
  shown = np.array([int(c[-1, 0, 0]) - int(c[0, 0, 0]) for c in crops]) / 2
  assert shown.min() < 82  # resized to 62: 50 / 62 of the height is seen
  assert shown.max() > 96  # resized to 50: all of it
  left = np.array([int(c[0, 0, 1]) for c in crops])
  assert left.min() < 10
  assert left.max() > 90


@pytest.mark.parametrize("side", [32, 64])
def test_center_crops_equal_the_original(side):
  golden = parity.golden()
  crop = center_crop(Image.fromarray(golden["crop_picture"]), side)
  np.testing.assert_array_equal(crop, golden[f"center_crop_{side}"])


def test_uint8_images_equal_the_original():
  golden = parity.golden()
  np.testing.assert_array_equal(to_uint8(golden["uint8_in"]), golden["uint8_out"])


def test_five_crops_lie_where_their_names_say():
  # 110 pixels are a range of 1.1 exactly: nothing is resized.
  pixels = noise(3, 110, 110)
  crop_set = CropSet(100, "five", (1.1,), mirror=True)
  crops = crop_set(Image.fromarray(pixels))
  assert len(crops) == len(crop_set.names) == 10
  offsets = {
    "top-left": (0, 0), "top-right": (0, 10), "bottom-left": (10, 0),
    "bottom-right": (10, 10), "center": (5, 5),
  }  # fmt: skip
  for i, (place, (y, x)) in enumerate(offsets.items()):
    assert crop_set.names[i] == f"1.1/{place}"
    assert crop_set.names[5 + i] == f"1.1/{place}/mirrored"
    expected = pixels[y : y + 100, x : x + 100]
    np.testing.assert_array_equal(crops[i], expected)
    expected = pixels[:, ::-1][y : y + 100, x : x + 100]
    np.testing.assert_array_equal(crops[5 + i], expected)


def test_center_crops():
  pixels = noise(3, 20, 30)
  crops = CropSet(20, "center", (1.0,), mirror=True)(Image.fromarray(pixels))
  np.testing.assert_array_equal(crops[0], pixels[:, 5:25])
  np.testing.assert_array_equal(crops[1], pixels[:, 5:25][:, ::-1])
