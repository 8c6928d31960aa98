"""Writing images: uint8 conversion, resizing, labelled grids, PNG and npz files."""

from collections.abc import Iterable, Sequence
import itertools
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llamagen_jax.sides import Sides, height_width
from llamagen_jax.storage import atomic_write

LABEL_HEIGHT = 14  # pixels above a labelled image
GAP = 2
BICUBIC_A = -0.75  # slope of the cubic kernel at 1; other libraries take -0.5


def to_uint8(images: jax.Array) -> jax.Array:
  """[-1, 1] -> uint8 as the original does: clip(127.5 x + 128), truncated."""
  return jnp.clip(127.5 * images + 128.0, 0, 255).astype(jnp.uint8)


def from_uint8(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def resize_bicubic(images: jax.Array, size: Sides) -> jax.Array:
  """Images [B, H, W, C] -> [B, *size, C], as the original resizes.

  Cubic convolution with half-pixel centres, borders repeated, and no
  antialiasing: PyTorch's default, which published scores at 384 depend on.
  """
  weights_oi, weights_pj = (
    jnp.asarray(_bicubic_weights(length, side))
    for length, side in zip(images.shape[1:3], height_width(size), strict=True)
  )
  return jnp.einsum(
    "BijC,oi,pj->BopC", images, weights_oi, weights_pj, precision="highest"
  )


def _bicubic_weights(length: int, side: int) -> np.ndarray:
  """[side, length]; the kernel is R. Keys' (1981)."""
  position = (np.arange(side) + 0.5) * length / side - 0.5
  first = np.floor(position).astype(int) - 1
  weights = np.zeros((side, length))
  for tap in range(4):
    distance = np.abs(position - (first + tap))
    near = ((BICUBIC_A + 2) * distance - (BICUBIC_A + 3)) * distance**2 + 1
    far = BICUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    column = np.clip(first + tap, 0, length - 1)
    np.add.at(weights, (np.arange(side), column), np.where(distance <= 1, near, far))
  return weights.astype(np.float32)


def grid(
  images: np.ndarray, columns: int, labels: Sequence[str] = (), zoom: int = 1
) -> Image.Image:
  """Lays uint8 images [B, H, W, 3] out in rows, with labels above if given."""
  count, height, width = images.shape[:3]
  height, width = height * zoom, width * zoom
  top = LABEL_HEIGHT if labels else 0
  rows = -(-count // columns)
  size = (columns * (width + GAP) - GAP, rows * (height + top + GAP) - GAP)
  sheet = Image.new("RGB", size, "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for i, image in enumerate(images):
    x, y = i % columns * (width + GAP), i // columns * (height + top + GAP)
    tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(tile, (x, y + top))
    if labels:
      text = _fitting(labels[i], width - 2, font)
      draw.text((x + 1, y + 1), text, fill="black", font=font)
  return sheet


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
  """Returns a label that does not reach into the next one's place."""
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(f"{text}..") > width:
    text = text[:-1]
  return f"{text}.." if text else ""


def save_png(path: str | os.PathLike, image: Image.Image) -> None:
  """Writes a PNG under its final name only when it is complete."""
  with atomic_write(path) as file:
    image.save(file, format="PNG")


def save_npz(
  path: str | os.PathLike,
  parts: Iterable[np.ndarray],
  count: int,
  labels: np.ndarray | None,
) -> None:
  """Writes what the ADM evaluators read, a part of the images at a time.

  `arr_0` holds the images, uint8 [count, H, W, 3], `arr_1` their labels if they have
  any. The bytes of the file depend on these alone.
  """
  parts = iter(parts)
  first = next(parts)
  header = {
    "descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:]),
  }  # fmt: skip
  with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
    with _member(archive, "arr_0.npy") as member:
      np.lib.format.write_array_header_1_0(member, header)
      for images in itertools.chain([first], parts):
        member.write(np.ascontiguousarray(images).data)
    if labels is not None:
      with _member(archive, "arr_1.npy") as member:
        np.lib.format.write_array(member, labels, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str):
  # ZipInfo has a fixed date; more than 4 GB need the long form of the header.
  return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)
