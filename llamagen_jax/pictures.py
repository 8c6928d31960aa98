"""Writing pictures: uint8 conversion, labelled grids, PNG and npz files."""

from collections.abc import Sequence
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABEL_HEIGHT = 14  # pixels above a labelled picture
GAP = 2


def to_uint8(images: jax.Array) -> jax.Array:
  """[-1, 1] -> uint8 as the original does: clip(127.5 x + 128), truncated."""
  return jnp.clip(127.5 * images + 128.0, 0, 255).astype(jnp.uint8)


def from_uint8(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def grid(
  images: np.ndarray, columns: int, labels: Sequence[str] = (), zoom: int = 1
) -> Image.Image:
  """Lays uint8 pictures [B, H, W, 3] out in rows, with labels above if given."""
  count, height, width = images.shape[:3]
  height, width = height * zoom, width * zoom
  top = LABEL_HEIGHT if labels else 0
  rows = -(-count // columns)
  size = (columns * (width + GAP) - GAP, rows * (height + top + GAP) - GAP)
  sheet = Image.new("RGB", size, "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for i, image in enumerate(images):
    x, y = i % columns * (width + GAP), i // columns * (height + top + GAP)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y + top))
    if labels:
      draw.text((x + 1, y + 1), labels[i], fill="black", font=font)
  return sheet


def save_png(path: str | os.PathLike, picture: Image.Image) -> None:
  """Writes a PNG under its final name only when it is complete."""
  path = pathlib.Path(path)
  part = path.with_name(f".{path.name}.part")
  picture.save(part, format="PNG")
  part.rename(path)


def save_npz(path: str | os.PathLike, images: np.ndarray) -> None:
  """Writes `arr_0`, uint8 [B, H, W, 3]: what the ADM evaluators read."""
  path = pathlib.Path(path)
  part = path.with_name(f".{path.name}.part")
  with part.open("wb") as file:
    np.savez(file, arr_0=images)
  part.rename(path)
