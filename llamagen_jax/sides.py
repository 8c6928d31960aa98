"""Sides of images in pixels and of grids in codes.

A square is one number, in memory and in every file, so that configs, bundles and
shards of squares are what they were before there was anything else. Other rectangles
are (height, width), as the axes of arrays lie; people read and write the pixels of an
image as WIDTHxHEIGHT.
"""

import math
import re
from typing import Any

from llamagen_jax.errors import UserError

Sides = int | tuple[int, int]
PIXELS = "SIDE or WIDTHxHEIGHT"  # what `read_pixels` reads
TEXT = re.compile(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?")


def as_sides(value: Any, name: str) -> Sides:
  """Returns one number, or two that differ, as JSON and flags may have them.

  Raises:
    UserError: with the name of the value, if it is anything else.
  """
  found = value if isinstance(value, tuple | list) else (value, value)
  numbers = all(isinstance(n, int) and n > 0 for n in found)
  if len(found) != 2 or not numbers:
    raise UserError(f"{name}={value!r}: expected a side or (height, width)")
  height, width = found
  return height if height == width else (height, width)


def height_width(sides: Sides) -> tuple[int, int]:
  """Returns both sides."""
  return (sides, sides) if isinstance(sides, int) else sides


def distance(one: Sides, other: Sides) -> tuple[float, float]:
  """Returns how far two sizes are apart: in shape first, then in area."""
  pairs = zip(height_width(one), height_width(other), strict=True)
  heights, widths = (math.log(a / b) for a, b in pairs)
  return abs(widths - heights), abs(widths + heights)


def read_pixels(text: str) -> Sides:
  """Reads SIDE or WIDTHxHEIGHT.

  Raises:
    ValueError: for other text.
  """
  match = TEXT.fullmatch(text)
  if match is None:
    raise ValueError(text)
  width, height = int(match[1]), int(match[2] or match[1])
  return as_sides((height, width), text)


def show_pixels(sides: Sides) -> str:
  """Returns WIDTHxHEIGHT."""
  height, width = height_width(sides)
  return f"{width}x{height}"


def show_grid(sides: Sides) -> str:
  """Returns ROWSxCOLUMNS, of codes."""
  return "{}x{}".format(*height_width(sides))


def grid_of(image_size: Sides, downsample: int) -> Sides:
  """Returns the sides, in codes, of an image of so many pixels.

  Raises:
    UserError: a side is not a multiple of the tokenizer's downsampling.
  """
  sides = height_width(image_size)
  if any(side % downsample for side in sides):
    raise UserError(
      f"image size {show_pixels(image_size)} is not a multiple of the tokenizer's"
      f" downsampling {downsample}"
    )
  return as_sides([side // downsample for side in sides], "image_size")


def image_size_of(grid: Sides, downsample: int) -> Sides:
  """Returns the sides, in pixels, of an image of so many codes."""
  return as_sides([side * downsample for side in height_width(grid)], "grid")
