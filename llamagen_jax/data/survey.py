"""A look at a source of images, to choose a recipe's sizes from the data."""

import dataclasses
import io

import numpy as np

from llamagen_jax.data.images import BadImage, ImageDecoder
from llamagen_jax.data.sources import Source
from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path

HELD_OUT = ("val", "validation", "valid", "test")  # folders beside one named train
LOOKED_AT = 400  # images, spread evenly over the source
SIDES = {32: 4, 64: 8, 128: 8, 256: 16}  # side of the images: downsampling
CODES_A_ROW = 512  # of the images, on average, for each row of the codebook
SMALLEST_CODEBOOK, LARGEST_CODEBOOK = 64, 16384


@dataclasses.dataclass(frozen=True)
class Survey:
  """What a source holds."""

  images: int
  class_names: tuple[str, ...]
  sides: tuple[int, ...]  # shorter sides of the images looked at, sorted

  @property
  def median(self) -> int:
    return self.sides[len(self.sides) // 2]

  @property
  def image_size(self) -> int:
    """Returns the largest of SIDES that half of the images have, or the smallest."""
    return max([side for side in SIDES if side <= self.median], default=min(SIDES))

  def codebook_size(self, codes: int) -> int:
    """Returns a power of two that images of so many codes can keep in use."""
    rows = max(1, self.images * codes // CODES_A_ROW)
    return int(
      np.clip(2 ** (rows.bit_length() - 1), SMALLEST_CODEBOOK, LARGEST_CODEBOOK)
    )

  def __str__(self) -> str:
    classes = f" of {len(self.class_names)} classes" if self.class_names else ""
    return (
      f"{self.images} images{classes}, shorter sides of {self.sides[0]} to"
      f" {self.sides[-1]} pixels, half of them {self.median} or more"
    )


def survey(source: Source, name: str) -> Survey:
  """Reads the headers of some images of a source.

  Args:
    source: the images.
    name: of the source, for the message.

  Raises:
    UserError: none of the images looked at can be read.
  """
  decoder, sides, problem = ImageDecoder(), [], ""
  count = min(len(source), LOOKED_AT)
  for index in np.linspace(0, len(source) - 1, count).astype(int):
    record = source[int(index)]
    try:
      if record.problem:
        raise BadImage(f"{record.key}: {record.problem}")
      sides.append(min(decoder.size(io.BytesIO(record.image), record.key)))
    except BadImage as error:
      problem = str(error)
  if not sides:
    raise UserError(f"{name}: none of {count} images can be read, such as {problem}")
  return Survey(len(source), tuple(source.class_names), tuple(sorted(sides)))


def held_out_beside(folder: str) -> str:
  """Returns the folder of held-out data beside one named train, or `folder`."""
  path = user_path(folder)
  if path.name == "train":
    for name in HELD_OUT:
      if path.with_name(name).is_dir():
        return str(path.with_name(name))
  return folder
