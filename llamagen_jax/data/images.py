"""Images decoded and cut to size: Grain transforms of a source's records."""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import math
from typing import IO

from absl import logging
import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from llamagen_jax.data.sources import ImageRecord, Source
from llamagen_jax.errors import UserError, first_line
from llamagen_jax.sides import Sides, as_sides, height_width

MOST_REPLACEMENTS = 20  # bad images in a row that end a run
MAX_PIXELS = 2**27  # 0.4 GB as RGB, in every thread that decodes
MAX_ASPECT = 20  # 256 pixels high, a wider image is no longer one of anything
# Others that Pillow opens run programs (EPS) or have no mark to know them by (TGA).
FORMATS = (
  "JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM",
)  # fmt: skip
BITS_PER_SAMPLE = 258  # tag of TIFF
EXIF_FIELDS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


class BadImage(Exception):
  """An image that cannot be used; the message says why."""


class SmallImage(BadImage):
  """An image with a side below `min_side`."""


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
  """Decodes image files to RGB, alike wherever images are read.

  Transparent pixels show the background, 16-bit grey keeps its high byte, and a camera
  that was turned (EXIF orientation) gives an upright image. Published ImageNet results
  are of images as stored: `ignore_exif`.
  """

  min_side: int = 1  # images with a smaller side are bad ones
  background: str = "white"  # a name, #rrggbb or rgb(r, g, b)
  ignore_exif: bool = False

  def __post_init__(self):
    try:
      ImageColor.getrgb(self.background)
    except (ValueError, AttributeError) as error:
      raise UserError(
        f"background={self.background!r}: expected a colour, such as white or #808080"
      ) from error

  def __call__(self, record: ImageRecord) -> Image.Image:
    """Decodes a record to RGB.

    Raises:
      BadImage: the record is broken, of an unfit kind or size, or not there;
        the message begins with its key.
    """
    if record.problem:
      raise BadImage(f"{record.key}: {record.problem}")
    return self.decode(io.BytesIO(record.image), record.key)

  def decode(self, file: IO[bytes], key: str) -> Image.Image:
    """Decodes an open file to RGB; raises BadImage, whose message begins with `key`."""
    with self._open(file, key) as image:
      return _to_rgb(_upright(image, self.ignore_exif), self.background)

  def hidden(
    self, file: IO[bytes], key: str, *, is_mask: bool = False
  ) -> np.ndarray | None:
    """Returns where an upright image is to be drawn, bool [H, W].

    That is where it lets more than half of its background through; or, where no pixel
    of a mask does, where it is light. None = nothing says so.
    """
    with self._open(file, key) as image:
      image = _upright(image, self.ignore_exif)
      if image.mode.startswith("I"):
        image = _high_byte(image)
      alpha = np.asarray(image.convert("RGBA"))[..., 3]
      if (alpha < 255).any():
        return alpha < 128
      return np.asarray(image.convert("L")) >= 128 if is_mask else None

  def size(self, file: IO[bytes], key: str) -> tuple[int, int]:
    """Returns (width, height) of an upright image, from its header alone."""
    with self._open(file, key) as image:
      width, height = image.size
      turned = not self.ignore_exif and _orientation(image) > 4
      return (height, width) if turned else (width, height)

  @contextlib.contextmanager
  def _open(self, file: IO[bytes], key: str) -> Iterator[Image.Image]:
    """Opens an image of a fit size; all errors of its body are BadImage, too."""
    try:
      with Image.open(file, formats=FORMATS) as image:
        self._check_size(image, key)
        yield image
    except BadImage:
      raise
    except Image.DecompressionBombError as error:
      raise BadImage(f"{key}: more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:  # its text names an address in memory
      raise BadImage(f"{key}: cannot be decoded (no known format)") from error
    except Exception as error:  # Pillow's decoders raise nearly anything
      reason = first_line(error).partition(" <_io.BytesIO")[0]
      raise BadImage(f"{key}: cannot be decoded ({reason})") from error

  def _check_size(self, image: Image.Image, key: str) -> None:
    """Bounds the work that an image makes, before its pixels are read."""
    width, height = image.size
    if min(image.size) < self.min_side:
      raise SmallImage(
        f"{key}: {width}x{height}, smaller than min_side={self.min_side}"
      )
    if width * height > MAX_PIXELS:
      raise BadImage(f"{key}: {width}x{height}, more than {MAX_PIXELS} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
      raise BadImage(f"{key}: {width}x{height}, longer than {MAX_ASPECT}:1")


def _orientation(image: Image.Image) -> int:
  """EXIF's orientation, 1 (upright) to 8; 1 where EXIF is broken.

  TIFF's own is applied by Pillow as it reads, and asking a PNG that has none would
  decode it.
  """
  if image.format == "TIFF" or not image.info.keys() & EXIF_FIELDS:
    return 1
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # a broken EXIF block does not spoil the image
    return 1
  return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image, ignore_exif: bool) -> Image.Image:
  image.load()
  if ignore_exif or _orientation(image) == 1:
    return image
  return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
  if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
    raise ValueError(f"pixels of mode {image.mode}, expected 8 or 16 bits")
  if image.mode.startswith("I"):
    image = _high_byte(image)
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  ground = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
  return Image.alpha_composite(ground, image).convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
  """Grey of 16 bits (12 in some TIFF) -> L, or LA where one value is transparent."""
  values = np.asarray(image)
  bits = 16
  if image.format == "TIFF":
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
  grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
  hidden = image.info.get("transparency")
  if isinstance(hidden, int):
    grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
  return grey


def resize_to_cover(image: Image.Image, sides: Sides) -> Image.Image:
  """Resizes to as little as covers a rectangle; for a square, by the shorter side.

  As ADM does it: box-halved while at least twice too large, then bicubic.
  """
  height, width = height_width(sides)
  while image.width >= 2 * width and image.height >= 2 * height:
    half = tuple(s // 2 for s in image.size)
    image = image.resize(half, Image.Resampling.BOX)
  scale = max(width / image.width, height / image.height)
  size = tuple(round(s * scale) for s in image.size)
  return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, sides: Sides) -> np.ndarray:
  """Crops the centre as ADM does: uint8 [H, W, 3], of those sides."""
  pixels = np.asarray(resize_to_cover(image, sides))
  height, width = height_width(sides)
  y, x = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
  return pixels[y : y + height, x : x + width]


def random_crop(
  image: Image.Image, side: int, max_resize: float, rng: np.random.Generator
) -> np.ndarray:
  """Crops a random square of `side` pixels, uint8 [side, side, 3].

  The image's shorter side is first resized to a uniform integer in
  [side, ceil(side * max_resize)]; the published recipe has max_resize = 1 / 0.8.
  """
  resized = int(rng.integers(side, math.ceil(side * max_resize) + 1))
  pixels = np.asarray(resize_to_cover(image, resized))
  y, x = (int(rng.integers(0, size - side + 1)) for size in pixels.shape[:2])
  return pixels[y : y + side, x : x + side]


@dataclasses.dataclass(frozen=True)
class CropSet:
  """The crops that code extraction takes of every image, in order.

  For every range r the image is centre-cropped to int(side * r), both ways. Of that
  area `kind` takes crops: "center" the centre; "five" top-left, top-right, bottom-left,
  bottom-right and centre. With `mirror` the same follow of the mirrored area.
  """

  sides: Sides  # in pixels
  kind: str  # center | five
  ranges: tuple[float, ...]
  mirror: bool

  def __post_init__(self):
    object.__setattr__(self, "sides", as_sides(self.sides, "image size"))
    if self.kind not in ("center", "five"):
      raise UserError(f"crops {self.kind!r}: expected center or five")
    if not self.ranges or min(self.ranges) < 1:
      raise UserError(f"crop ranges {self.ranges}: expected numbers of at least 1")

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the crops, such as 1.1/top-left/mirrored."""
    corners = ("top-left", "top-right", "bottom-left", "bottom-right")
    positions = (*corners, "center") if self.kind == "five" else ("center",)
    sides = ("", "/mirrored") if self.mirror else ("",)
    return tuple(
      f"{r:g}/{position}{side}"
      for r in self.ranges
      for side in sides
      for position in positions
    )

  def __call__(self, image: Image.Image) -> np.ndarray:
    """Crops an image: uint8 [crops, H, W, 3], in the order of `names`."""
    (height, width), crops = height_width(self.sides), []
    for r in self.ranges:
      area = center_crop(image, (int(height * r), int(width * r)))
      bottom, right = area.shape[0] - height, area.shape[1] - width
      corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
      if self.kind == "center":
        corners = []
      middle = round(bottom / 2), round(right / 2)  # halves to even, as the original's
      for pixels in (area, area[:, ::-1]) if self.mirror else (area,):
        for y, x in (*corners, middle):
          crops.append(pixels[y : y + height, x : x + width])
    return np.stack(crops)


@dataclasses.dataclass(frozen=True)
class TrainingImage:
  """Grain transform: record -> a random crop for training the tokenizer.

  A bad image is replaced by another one, chosen by the same random numbers;
  `replaced` counts how often, and the log names the image.
  """

  source: Source
  side: int
  max_resize: float  # of the resized shorter side, relative to `side`
  random_flip: bool
  decoder: ImageDecoder

  def __call__(self, record: ImageRecord, rng: np.random.Generator) -> dict:
    """Returns image uint8 [side, side, 3] and replaced int32."""
    replaced = 0
    while True:
      try:
        image = self.decoder(record)
        break
      except BadImage as problem:
        logging.warning("bad image %s", problem)
        replaced += 1
        if replaced == MOST_REPLACEMENTS:
          raise UserError(f"{replaced} bad images in a row, last {problem}") from None
        record = self.source[int(rng.integers(len(self.source)))]
    pixels = random_crop(image, self.side, self.max_resize, rng)
    if self.random_flip and rng.integers(2):
      pixels = pixels[:, ::-1]
    return {"image": np.ascontiguousarray(pixels), "replaced": np.int32(replaced)}


@dataclasses.dataclass(frozen=True)
class CenterImage:
  """Grain transform: record -> its centre crop; a bad one is grey, with weight 0."""

  side: int
  decoder: ImageDecoder

  def __call__(self, record: ImageRecord) -> dict:
    """Returns image uint8 [side, side, 3] and weight float32."""
    try:
      pixels = center_crop(self.decoder(record), self.side)
      return {"image": pixels, "weight": np.float32(1)}
    except BadImage as problem:
      logging.warning("bad image %s", problem)
      grey = np.full((self.side, self.side, 3), 128, np.uint8)
      return {"image": grey, "weight": np.float32(0)}
