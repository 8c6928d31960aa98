"""Editing: inpainting, outpainting to any side, and variations of an image.

An image is put on a canvas, the canvas becomes codes, the codes of hidden cells are
drawn around the known ones, and the image's own pixels are put back where nothing was
hidden. A canvas that is larger than what the model draws is filled tile by tile.

Axes: N images that come out, H, W pixels of the canvas, h, w its cells (codes).
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import scipy.ndimage

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import to_uint8
from llamagen_jax.options import option
from llamagen_jax.sampling.keys import SEEDS
from llamagen_jax.sampling.known_codes import CANDIDATES, KnownCodes
from llamagen_jax.sampling.sample import (
  Conditions,
  SamplingJob,
  conditions_of,
  sample_image_codes,
)
from llamagen_jax.sampling.sizes import grids_by_size
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.sides import (
  Sides,
  as_sides,
  height_width,
  image_size_of,
  show_pixels,
)
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.weights import bundle

TILE_SEED = 2**32  # between the seeds of tiles, beyond those that people take


class Borders(NamedTuple):
  """Pixels to add on each side of an image."""

  left: int = 0
  top: int = 0
  right: int = 0
  bottom: int = 0


@dataclasses.dataclass(frozen=True)
class Canvas:
  """An image, and where it is to be drawn."""

  pixels: np.ndarray  # uint8 [H, W, 3]
  hidden: np.ndarray  # bool [H, W]

  @property
  def size(self) -> str:
    height, width = self.hidden.shape
    return f"{width}x{height} pixels"

  def extended(self, borders: Borders) -> "Canvas":
    """Returns the canvas with hidden borders around it."""
    b = borders
    if min(b) < 0:
      raise UserError(f"outpaint={tuple(b)}: expected pixels, 0 or more")
    around = ((b.top, b.bottom), (b.left, b.right))
    return Canvas(
      np.pad(self.pixels, (*around, (0, 0))),
      np.pad(self.hidden, around, constant_values=True),
    )

  def seen(self, settings: "EditSettings") -> np.ndarray:
    """Returns the pixels to encode, uint8 [H, W, 3].

    What lies under a mask is not to be seen, unless some of it is kept; but an encoder
    would see it, and its codes near the mask would tell of it.
    """
    whole = settings.keeps_some or self.hidden.all()
    return self.pixels if whole else self.filled()

  def filled(self) -> np.ndarray:
    """Returns the pixels, where hidden those of the nearest that are not."""
    nearest = scipy.ndimage.distance_transform_edt(
      self.hidden, return_distances=False, return_indices=True
    )
    return self.pixels[tuple(nearest)]

  def hidden_cells(self, downsample: int) -> np.ndarray:
    """Returns the cells of which any pixel is hidden, bool [h, w]."""
    height, width = (side // downsample for side in self.hidden.shape)
    cells = self.hidden.reshape(height, downsample, width, downsample)
    return cells.any(axis=(1, 3))

  def put_back(self, images_NHWC: np.ndarray, feather: int) -> np.ndarray:
    """Returns images whose pixels are the canvas' own where nothing is hidden.

    From a hidden pixel to one that is `feather` pixels away, one image becomes the
    other, so that no seam is seen.
    """
    if self.hidden.all():
      return images_NHWC
    distance = scipy.ndimage.distance_transform_edt(~self.hidden)
    drawn_HW1 = np.clip(1 - distance / feather, 0, 1)[..., None]
    drawn_HW1[self.hidden] = 1
    mixed = drawn_HW1 * images_NHWC + (1 - drawn_HW1) * self.pixels
    return np.rint(mixed).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditSettings:
  """How the codes of an image are drawn anew."""

  strength: float = option("share of the hidden codes that are drawn anew", 1.0)
  keep_rows: int = option(
    "first rows of codes that are kept in any case", 0, unit="ROWS", at_least=0
  )
  candidates: int = option(
    "drawn at once for an image, to choose those that known codes follow from",
    CANDIDATES, unit="IMAGES", at_least=1,
  )  # fmt: skip

  def __post_init__(self):
    if not 0 <= self.strength <= 1:
      raise UserError(f"strength={self.strength}: expected 0 .. 1")

  @property
  def keeps_some(self) -> bool:
    """Whether hidden codes are kept, so that hidden pixels are looked at."""
    return self.strength < 1 or self.keep_rows > 0


def edit(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  image: np.ndarray,
  mask: np.ndarray | None = None,
  classes: Sequence[int | str] | str = (),
  *,
  prompts: Sequence[str] = (),
  text_encoder: TextEncoder | None = None,
  negative_prompt: str = "",
  outpaint: Borders = Borders(),
  settings: EditSettings = EditSettings(),
  seed: int = 0,
  batch_size: int = 1,
  **sampling,
) -> np.ndarray:
  """Draws parts of an image anew, one result a class or prompt.

  Args:
    gpt: from `load_gpt`.
    tokenizer: from `load_tokenizer`; the one whose codes `gpt` learned.
    image: uint8 [H, W, 3], with the borders as large as the model's images or larger.
    mask: bool [H, W], True where to draw; None = everywhere, or with `outpaint` in its
      borders alone.
    classes: as of `sample`, and so are the next three.
    prompts: texts, instead of classes, for a transformer of captions.
    text_encoder: from `load_t5`.
    negative_prompt: text that guidance leads away from.
    outpaint: pixels to draw on each side of the image.
    settings: how much is drawn, and from how many candidates.
    seed: 0 .. 2^64 - 1; result i depends on (seed, i).
    batch_size: results at a time on every device.
    **sampling: fields of `SamplingConfig` that differ from the bundle's.

  Returns:
    uint8 [N, H, W, 3], the image's own pixels where nothing was to be drawn.

  Raises:
    UserError: for sizes that the model cannot draw, and as `sample` does.
  """
  everywhere = mask is None and not any(outpaint)
  hidden = np.full(image.shape[:2], everywhere) if mask is None else mask.astype(bool)
  if hidden.shape != image.shape[:2]:
    raise UserError(f"the mask is {hidden.shape}, the image {image.shape[:2]} pixels")
  return edit_canvas(
    gpt, tokenizer, Canvas(image, hidden).extended(outpaint),
    conditions_of(gpt, classes, prompts, text_encoder, negative_prompt),
    dataclasses.replace(gpt.sampling, **sampling), settings, seed=seed,
    batch_size=batch_size, timings=Timings(),
  )  # fmt: skip


def edit_canvas(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  canvas: Canvas,
  conditions: Conditions,
  sampling: SamplingConfig,
  settings: EditSettings,
  *,
  seed: int,
  batch_size: int,
  timings: Timings,
) -> np.ndarray:
  """Draws the hidden part of a canvas, one result a condition: uint8 [N, H, W, 3]."""
  size = as_sides(canvas.hidden.shape, "image size")
  own_grid = grids_by_size(gpt, tokenizer).get(size, gpt.config.grid)
  gpt = dataclasses.replace(gpt, config=gpt.config.at(own_grid))
  (rows, columns), scale = gpt.config.grid_hw, tokenizer.config.downsample
  image_size = image_size_of(own_grid, scale)
  check_size(canvas, image_size, scale)
  unknown_hw = canvas.hidden_cells(scale)
  codes_hw = np.asarray(tokenizer.encode(canvas.seen(settings)[None])[0])
  count = len(conditions)
  codes_Nhw = np.repeat(codes_hw[None], count, axis=0)
  redrawn_Nhw = redrawn_cells(unknown_hw, settings, seed, count)
  for number, (y, x) in enumerate(tiles(unknown_hw, gpt.config.grid)):
    at = np.s_[:, y : y + rows, x : x + columns]
    given = KnownCodes(
      codes_Nhw[at].reshape(count, -1), ~redrawn_Nhw[at].reshape(count, -1),
      settings.candidates,
    )  # fmt: skip
    job = SamplingJob(
      conditions, sampling, (seed + number * TILE_SEED) % SEEDS, batch_size,
      image_size, given,
    )  # fmt: skip
    drawn_NT = sample_image_codes(gpt, tokenizer, job, timings)
    codes_Nhw[at] = drawn_NT.reshape(count, rows, columns)
    redrawn_Nhw[at] = False
  with timings.clock("tokenizer"):
    images = [to_uint8(tokenizer.decode(codes[None])) for codes in codes_Nhw]
    images_NHWC = np.concatenate(jax.device_get(images))
  return canvas.put_back(images_NHWC, feather(scale))


def feather(downsample: int) -> int:
  """Returns the pixels in which drawn and own ones mix: half a code's width."""
  return max(1, downsample // 2)


def check_size(canvas: Canvas, image_size: Sides, scale: int) -> None:
  """Refuses a canvas that a model of images of that size cannot draw.

  Raises:
    UserError: names the size found and the sizes expected.
  """
  found, drawn = canvas.hidden.shape, height_width(image_size)
  sizes = f"the image is {canvas.size}, the model draws {show_pixels(image_size)}"
  if canvas.hidden.all() and found != drawn:
    raise UserError(f"{sizes}: a variation has that size")
  if any(f < d or f % scale for f, d in zip(found, drawn, strict=True)):
    raise UserError(
      f"{sizes}: expected that size, or a larger one whose sides are multiples of"
      f" {scale}"
    )
  if not canvas.hidden.any():
    raise UserError("nothing is to be drawn: the mask hides no pixel")


def redrawn_cells(
  unknown_hw: np.ndarray, settings: EditSettings, seed: int, count: int
) -> np.ndarray:
  """Returns the cells that each image draws anew, bool [N, h, w].

  Those of a small strength are among those of a larger one.
  """
  noise_Nhw = np.stack(
    [np.random.default_rng([seed, i]).random(unknown_hw.shape) for i in range(count)]
  )
  below_h1 = np.arange(len(unknown_hw))[:, None] >= settings.keep_rows
  return unknown_hw & below_h1 & (noise_Nhw < settings.strength)


def tiles(unknown_hw: np.ndarray, grid: Sides) -> Iterator[tuple[int, int]]:
  """Yields corners (y, x) of tiles of a grid's size that together cover unknown cells.

  Each is the one with the most unknown cells of those that are half known at least,
  after the tiles before it; or, where there is none, the one that knows most.
  """
  unknown_hw, (rows, columns) = unknown_hw.copy(), height_width(grid)
  half = rows * columns // 2
  while unknown_hw.any():
    view = np.lib.stride_tricks.sliding_window_view(unknown_hw, (rows, columns))
    count = view.sum(axis=(2, 3))
    worth = np.where(count <= half, count, half - count)
    worth[count == 0] = -rows * columns
    y, x = np.unravel_index(np.argmax(worth), worth.shape)
    yield int(y), int(x)
    unknown_hw[y : y + rows, x : x + columns] = False
