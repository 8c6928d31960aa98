"""The demo's editor: an image on a canvas, and a brush that says where to draw."""

import io
import math
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from llamagen_jax.serving.sizes import Size
from llamagen_jax.serving.upload import Upload

SMALLEST = 256  # pixels of the canvas, so that a finger can paint on a small image
BRUSH = "#7c3aed"


def make_editor(size: Size) -> gr.ImageEditor:
  """Returns an editor of images of that width and height."""
  width, height = (side * scale(size) for side in size)
  return gr.ImageEditor(
    type="numpy", show_label=False, image_mode="RGBA",
    sources=("upload", "clipboard"), transforms=(), layers=False, buttons=[],
    canvas_size=(width, height), fixed_canvas=True, elem_id="editor",
    brush=gr.Brush(
      default_size=width // 8, colors=[BRUSH], default_color=BRUSH, color_mode="fixed"
    ),
  )  # fmt: skip


def scale(size: Size) -> int:
  """Returns how many pixels of the canvas a pixel of an image takes, each way."""
  return max(1, math.ceil(SMALLEST / min(size)))


def to_editor(image: np.ndarray) -> dict[str, Any]:
  """Returns the value of an editor of an image, uint8 [H, W, 3], unpainted."""
  times = scale((image.shape[1], image.shape[0]))
  large = image.repeat(times, axis=0).repeat(times, axis=1)
  return {"background": large, "layers": [], "composite": None}


def from_editor(value: dict[str, Any] | None, size: Size) -> Upload | None:
  """Returns the image and mask of an editor, of the model's size; None = no image.

  A pixel is hidden if it is painted, or if the image does not reach it. Where nothing
  is hidden there is no mask.
  """
  if value is None or value["background"] is None:
    return None
  background = Image.fromarray(value["background"]).convert("RGBA")
  alpha = np.asarray(background)[..., 3]
  painted = [np.asarray(layer)[..., 3] > 0 for layer in value["layers"]]
  hidden = np.logical_or.reduce([alpha < 128, *painted])
  mask = Image.fromarray(np.where(hidden, 255, 0).astype(np.uint8))
  image = background.convert("RGB")
  times = scale(size)
  files = [_png(part.reduce(times)) for part in (image, mask)]
  return Upload(files[0], files[1] if hidden.any() else None)


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, format="PNG")
  return file.getvalue()
