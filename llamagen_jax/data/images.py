"""Images decoded and cut to size: Grain transforms of a source's samples."""

import dataclasses
import io
import math

from absl import logging
import numpy as np
from PIL import Image, UnidentifiedImageError

from llamagen_jax.data.sources import ImageRecord, Source
from llamagen_jax.errors import UserError

MOST_REPLACEMENTS = 20  # bad images in a row that end a run


class BadImage(Exception):
  """An image that cannot be used; the message says why."""


def decode(sample: ImageRecord, min_side: int) -> Image.Image:
  """Decodes a sample to RGB; raises BadImage for a broken or tiny one."""
  if not sample.image:
    raise BadImage(f"{sample.key}: no such file, or an empty one")
  try:
    with Image.open(io.BytesIO(sample.image)) as image:
      image = image.convert("RGB")
  except UnidentifiedImageError as error:  # its text names a place in memory
    raise BadImage(f"{sample.key}: cannot be decoded (no known format)") from error
  except Exception as error:  # Pillow's decoders raise nearly anything
    reason = str(error).partition(" <_io.BytesIO")[0]  # not the address in memory
    raise BadImage(f"{sample.key}: cannot be decoded ({reason})") from error
  if min(image.size) < min_side:
    width, height = image.size
    raise BadImage(f"{sample.key}: {width}x{height}, smaller than {min_side}")
  return image


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
  """ADM's resize: box-halved while at least twice too large, then bicubic."""
  while min(image.size) >= 2 * side:
    half = tuple(s // 2 for s in image.size)
    image = image.resize(half, Image.Resampling.BOX)
  scale = side / min(image.size)
  size = tuple(round(s * scale) for s in image.size)
  return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, side: int) -> np.ndarray:
  """ADM's centre crop: uint8 [side, side, 3]."""
  pixels = np.asarray(resize_shorter_side(image, side))
  y, x = ((size - side) // 2 for size in pixels.shape[:2])
  return pixels[y : y + side, x : x + side]


def random_crop(
  image: Image.Image, side: int, largest: float, rng: np.random.Generator
) -> np.ndarray:
  """A random square of `side` pixels, uint8 [side, side, 3].

  The image's shorter side is first resized to a uniform integer in
  [side, ceil(side * largest)]; the published recipe has largest = 1 / 0.8.
  """
  resized = int(rng.integers(side, math.ceil(side * largest) + 1))
  pixels = np.asarray(resize_shorter_side(image, resized))
  y, x = (int(rng.integers(0, size - side + 1)) for size in pixels.shape[:2])
  return pixels[y : y + side, x : x + side]


@dataclasses.dataclass(frozen=True)
class CropSet:
  """The crops that code extraction takes of every image, in order.

  For every range r the image is centre-cropped to int(side * r), and of that
  `kind` takes: "center" the centre; "five" top-left, top-right, bottom-left,
  bottom-right and centre. With `mirror` the same follow of the mirrored image.
  """

  side: int
  kind: str  # center | five
  ranges: tuple[float, ...]
  mirror: bool

  def __post_init__(self):
    if self.kind not in ("center", "five"):
      raise UserError(f"crops {self.kind!r}: expected center or five")
    if not self.ranges or min(self.ranges) < 1:
      raise UserError(f"crop ranges {self.ranges}: expected numbers of at least 1")

  @property
  def names(self) -> tuple[str, ...]:
    corners = ("top-left", "top-right", "bottom-left", "bottom-right")
    places = (*corners, "center") if self.kind == "five" else ("center",)
    sides = ("", "/mirrored") if self.mirror else ("",)
    return tuple(
      f"{r:g}/{place}{side}" for r in self.ranges for side in sides for place in places
    )

  def __call__(self, image: Image.Image) -> np.ndarray:
    """uint8 [crops, side, side, 3], in the order of `names`."""
    crops = []
    for r in self.ranges:
      whole = center_crop(image, int(self.side * r))
      for pixels in (whole, whole[:, ::-1]) if self.mirror else (whole,):
        end = len(pixels) - self.side
        middle = round(end / 2)  # halves to even, as the original's
        corners = [(0, 0), (0, end), (end, 0), (end, end)]
        if self.kind == "center":
          corners = []
        for y, x in (*corners, (middle, middle)):
          crops.append(pixels[y : y + self.side, x : x + self.side])
    return np.stack(crops)


@dataclasses.dataclass(frozen=True)
class TrainingImage:
  """Grain transform: sample -> a random crop for training the tokenizer.

  The place of a bad image is taken by another one, drawn by the same random
  numbers; `replaced` counts how often, and the log names the image.
  """

  source: Source
  side: int
  largest: float  # of the resized shorter side, relative to `side`
  mirror: bool
  min_side: int

  def __call__(self, sample: ImageRecord, rng: np.random.Generator) -> dict:
    replaced = 0
    while True:
      try:
        image = decode(sample, self.min_side)
        break
      except BadImage as problem:
        logging.warning("bad image %s", problem)
        replaced += 1
        if replaced == MOST_REPLACEMENTS:
          raise UserError(f"{replaced} bad images in a row, last {problem}") from None
        sample = self.source[int(rng.integers(len(self.source)))]
    pixels = random_crop(image, self.side, self.largest, rng)
    if self.mirror and rng.integers(2):
      pixels = pixels[:, ::-1]
    return {"image": np.ascontiguousarray(pixels), "replaced": np.int32(replaced)}


@dataclasses.dataclass(frozen=True)
class CenterImage:
  """Grain transform: record -> its centre crop; a bad one is grey, with weight 0."""

  side: int
  min_side: int

  def __call__(self, sample: ImageRecord) -> dict:
    try:
      pixels = center_crop(decode(sample, self.min_side), self.side)
      return {"image": pixels, "weight": np.float32(1)}
    except BadImage as problem:
      logging.warning("bad image %s", problem)
      grey = np.full((self.side, self.side, 3), 128, np.uint8)
      return {"image": grey, "weight": np.float32(0)}
