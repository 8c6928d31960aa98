import io

import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.images import (
  BadImage,
  CropSet,
  ImageDecoder,
  TrainingImage,
  center_crop,
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
    (png(noise(0, 40, 12)), "12x40, smaller than min_side=16"),
  ],
)
def test_bad_images_say_why(image, why):
  with pytest.raises(BadImage, match=f"x.png: {why}"):
    ImageDecoder(16)(ImageRecord("x.png", image))


def test_a_bad_image_is_replaced_and_counted(folder):
  (folder / "a" / "3.png").write_bytes(b"broken")
  source = open_source(f"folder:{folder}")
  transform = TrainingImage(source, 16, 1.25, True, ImageDecoder(16))
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


@pytest.mark.parametrize(
  "size, seen", [((30, 20), np.s_[:, 5:25]), ((10, 30), np.s_[10:20])]
)
def test_crops_that_are_not_square(size, seen):
  pixels = noise(3, 30, 30)
  crops = CropSet(size, "center", (1.0,), mirror=True)(Image.fromarray(pixels))
  np.testing.assert_array_equal(crops, [pixels[seen], pixels[seen][:, ::-1]])
  whole = Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))  # is halved once
  np.testing.assert_array_equal(center_crop(whole, size), pixels[seen])


def test_five_crops_of_a_wide_image_lie_where_their_names_say():
  pixels = noise(3, 55, 110)
  crops = CropSet((50, 100), "five", (1.1,), mirror=False)(Image.fromarray(pixels))
  for crop, (y, x) in zip(
    crops, ((0, 0), (0, 10), (5, 0), (5, 10), (2, 5)), strict=True
  ):
    np.testing.assert_array_equal(crop, pixels[y : y + 50, x : x + 100])


def encoded(image: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format=kind, **options)
  return file.getvalue()


def pixels_of(image: bytes, **options) -> np.ndarray:
  decoder = ImageDecoder(**options)
  return np.asarray(decoder(ImageRecord("x", image))).astype(int)


def transparent_images() -> dict[str, bytes]:
  """Files of a red square of 24 pixels; only its green middle, 12 pixels, is opaque."""
  rgba = np.zeros((24, 24, 4), np.uint8)
  rgba[..., 0] = 255
  rgba[6:18, 6:18] = (0, 255, 0, 255)
  image = Image.fromarray(rgba)
  palette = Image.new("P", (24, 24), 0)
  palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
  palette.paste(1, (6, 6, 18, 18))
  alphas = bytes([0, 255])
  return {
    "png": encoded(image, "PNG"),
    "webp": encoded(image, "WEBP", lossless=True, exact=True),
    "tiff": encoded(image, "TIFF"),
    "avif": encoded(image, "AVIF", quality=100, subsampling="4:4:4"),
    "jpeg2000": encoded(image, "JPEG2000"),
    "gif": encoded(palette, "GIF", transparency=0),
    "palette": encoded(palette, "PNG", transparency=0),
    "palette of alphas": encoded(palette, "PNG", transparency=alphas),
    "one colour": encoded(image.convert("RGB"), "PNG", transparency=(255, 0, 0)),
  }


@pytest.mark.parametrize("kind", transparent_images())
def test_transparent_pixels_show_the_background(kind):
  image = transparent_images()[kind]
  for background, colour in (("white", (255,) * 3), ("#102030", (16, 32, 48))):
    pixels = pixels_of(image, background=background)
    assert np.abs(pixels[0, 0] - colour).max() <= 2
    assert np.abs(pixels[12, 12] - (0, 255, 0)).max() <= 4


def test_grey_with_alpha_and_half_transparent_pixels():
  grey = np.zeros((24, 24, 2), np.uint8)
  grey[..., 0], grey[12:, :, 1] = 10, 255
  pixels = pixels_of(encoded(Image.fromarray(grey, "LA"), "PNG"))
  assert pixels[0, 0].tolist() == [255] * 3 and pixels[20, 0].tolist() == [10] * 3
  half = Image.new("RGBA", (24, 24), (0, 0, 255, 128))
  np.testing.assert_allclose(pixels_of(encoded(half, "PNG"))[0, 0], (127, 127, 255))


def test_opaque_pixels_are_not_changed():
  rgb = noise(1, 24, 24)
  rgba = np.dstack([rgb, np.full((24, 24), 255, np.uint8)])
  np.testing.assert_array_equal(pixels_of(png(rgba), background="black"), rgb)


def test_16_bit_grey_keeps_its_high_byte():
  values = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
  for kind in ("PNG", "TIFF", "PPM"):
    pixels = pixels_of(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(pixels[..., 1], values >> 8)
  image = Image.fromarray(values)
  pixels = pixels_of(encoded(image, "PNG", transparency=int(values[3, 3])))
  assert pixels[3, 3].tolist() == [255] * 3
  assert pixels[3, 4].tolist() == [values[3, 4] >> 8] * 3


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_that_are_no_bytes_are_refused(kind):
  values = np.random.default_rng(0).uniform(0, 255, (32, 32)).astype(kind)
  with pytest.raises(BadImage, match="x: .*pixels of mode [FI], expected 8 or 16 bits"):
    pixels_of(encoded(Image.fromarray(values), "TIFF"))


def quadrants() -> Image.Image:
  """Red top left, green top right, blue bottom left, white; 32 wide, 48 high."""
  pixels = np.zeros((48, 32, 3), np.uint8)
  pixels[:24, :16], pixels[:24, 16:] = (255, 0, 0), (0, 255, 0)
  pixels[24:, :16], pixels[24:, 16:] = (0, 0, 255), (255, 255, 255)
  return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_come_upright(kind, orientation):
  stored = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
  }[orientation]  # fmt: skip
  turned = quadrants() if stored is None else quadrants().transpose(stored)
  exif = Image.Exif()
  exif[0x112] = orientation
  image = encoded(turned, kind, exif=exif, quality=100)
  upright = pixels_of(image)
  assert upright.shape == (48, 32, 3)
  for (y, x), colour in {
    (8, 8): (255, 0, 0), (8, 24): (0, 255, 0), (40, 8): (0, 0, 255),
  }.items():  # fmt: skip
    assert np.abs(upright[y, x] - colour).max() < 30
  assert ImageDecoder().size(io.BytesIO(image), "x") == (32, 48)
  as_stored = ImageDecoder(ignore_exif=True)
  assert as_stored(ImageRecord("x", image)).size == turned.size
  assert as_stored.size(io.BytesIO(image), "x") == turned.size


def test_a_broken_exif_block_spoils_no_image():
  image = encoded(quadrants(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
  assert pixels_of(image).shape == (48, 32, 3)


@pytest.mark.parametrize(
  "size, words",
  [
    ((17, 160_000), "17x160000, longer than 20:1"),
    ((65_000, 16), "65000x16, longer than 20:1"),
    ((20_000, 20_000), "more than 134217728 pixels"),
    ((11_600, 11_600), "11600x11600, more than 134217728 pixels"),
  ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_images_are_refused_before_they_are_decoded(size, words, monkeypatch):
  image = encoded(Image.new("1", size), "PNG")

  def load(_):
    raise AssertionError("decoded")

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
  with pytest.raises(BadImage, match=f"x: {words}"):
    ImageDecoder()(ImageRecord("x", image))
  with pytest.raises(BadImage):
    ImageDecoder().size(io.BytesIO(image), "x")


@pytest.mark.parametrize("colour", ["whit", "", "#12345", "1,2,3"])
def test_a_colour_that_is_none_is_named(colour):
  with pytest.raises(UserError, match=f"background='{colour}': expected a colour"):
    ImageDecoder(background=colour)


def test_formats_that_run_programs_are_not_opened():
  script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n"
  with pytest.raises(BadImage, match="no known format"):
    pixels_of(script)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_one_transparent_value_of_a_grey_image(mode):
  image = Image.new("L", (24, 24))
  image.paste(255, (6, 6, 18, 18))
  pixels = pixels_of(encoded(image.convert(mode), "PNG", transparency=0))
  assert pixels[0, 0].tolist() == pixels[12, 12].tolist() == [255] * 3


def test_what_is_to_be_drawn():
  light = np.zeros((4, 6), bool)
  light[:2] = True
  grey = Image.fromarray(np.where(light, 255, 0).astype(np.uint8))

  def hidden(image, is_mask):
    return ImageDecoder().hidden(
      io.BytesIO(encoded(image, "PNG")), "x", is_mask=is_mask
    )

  assert hidden(grey, False) is None
  np.testing.assert_array_equal(hidden(grey, True), light)
  opaque = grey.convert("RGBA")  # as most programs save what they show
  assert hidden(opaque, False) is None
  np.testing.assert_array_equal(hidden(opaque, True), light)
  opaque.putalpha(grey)  # light pixels are opaque now
  for is_mask in (False, True):
    np.testing.assert_array_equal(hidden(opaque, is_mask), ~light)
