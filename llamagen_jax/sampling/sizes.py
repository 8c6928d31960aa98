"""The sizes of images that a model draws, and which of them is drawn for another."""

import dataclasses
import fractions

from llamagen_jax.errors import UserError
from llamagen_jax.sides import Sides, distance, height_width, image_size_of, show_pixels
from llamagen_jax.weights import bundle


def for_size(
  gpt: bundle.Transformer, tokenizer: bundle.Tokenizer, image_size: Sides | None
) -> tuple[bundle.Transformer, Sides]:
  """Returns the transformer at one of its grids, and the size that it draws there.

  Args:
    image_size: that is wanted, in pixels; None = that of the first grid. If no grid
      has it, the nearest of the same shape is taken.

  Raises:
    UserError: no grid has the shape.
  """
  sizes = grids_by_size(gpt, tokenizer)
  size = image_size or next(iter(sizes))
  alike = [s for s in sizes if _shape(s) == _shape(size)]
  if not alike:
    raise UserError(
      f"image size {show_pixels(size)}: expected the shape of the model's images,"
      f" {' or '.join(map(show_pixels, sizes))}"
    )
  drawn = min(alike, key=lambda s: distance(s, size))
  return dataclasses.replace(gpt, config=gpt.config.at(sizes[drawn])), drawn


def grids_by_size(
  gpt: bundle.Transformer, tokenizer: bundle.Tokenizer
) -> dict[Sides, Sides]:
  """Returns the model's grids by the size of their images, the first one first."""
  return {image_size_of(g, tokenizer.config.downsample): g for g in gpt.config.grids}


def _shape(size: Sides) -> fractions.Fraction:
  return fractions.Fraction(*height_width(size))
