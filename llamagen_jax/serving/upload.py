"""A form with an image and a mask -> fields, and the canvas that they make."""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from starlette.datastructures import UploadFile
from starlette.requests import Request

from llamagen_jax.data.images import BadImage, ImageDecoder
from llamagen_jax.sampling.edit import Canvas
from llamagen_jax.serving.api_error import APIError, encodable
from llamagen_jax.serving.sizes import Size, text

FILES = {"image": "image", "image[]": "image", "mask": "mask"}
LISTS = {"class_labels": "class_labels", "class_labels[]": "class_labels"}
MOST_FILES, MOST_FIELDS = 17, 100  # OpenAI's clients may send 16 images
LONGEST_FIELD = 200_000  # bytes
MAX_PIXELS = 2**26  # a small file may hold as many: 0.6 GB while it is read


@dataclasses.dataclass(frozen=True)
class Upload:
  """The files of a form."""

  image: bytes
  mask: bytes | None = None


async def read_form(request: Request) -> tuple[dict[str, Any], Upload, list[str]]:
  """Returns the fields of a form, its files, and warnings about files ignored.

  Raises:
    APIError: 400 for another type of body, no image, or several.
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "multipart/form-data":
    message = "the body must be a form, sent as Content-Type: multipart/form-data"
    raise APIError(400, message, code="invalid_form")
  fields: dict[str, Any] = {}
  files: dict[str, list[bytes]] = {"image": [], "mask": []}
  warnings = []
  form = request.form(
    max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=LONGEST_FIELD
  )
  async with form as parts:
    for name, value in parts.multi_items():
      if isinstance(value, UploadFile) and name in FILES:
        files[FILES[name]].append(await value.read())
      elif isinstance(value, UploadFile):
        warnings.append(f"'{encodable(name[:60])}' is ignored.")
      elif name in FILES:
        raise _invalid(FILES[name], "expected a file")
      elif name in LISTS:
        fields.setdefault(LISTS[name], []).append(value)
      elif value != "":
        fields[name] = value
  if not files["image"]:
    raise APIError(400, "An image is required.", code="missing", param="image")
  for name, found in files.items():
    if len(found) > 1:
      raise _invalid(name, f"expected one file, found {len(found)}")
  return fields, Upload(files["image"][0], next(iter(files["mask"]), None)), warnings


def open_canvas(
  upload: Upload, size: Size, keeps_some: bool
) -> tuple[Canvas, list[str]]:
  """Returns the image on a canvas of the model's size, and warnings.

  An image of another size is scaled without distortion and cropped around its centre.

  Args:
    upload: an image, and a mask or none.
    size: width and height of the model's images.
    keeps_some: something of the image is kept where no mask says so.

  Raises:
    APIError: 400 for a file that is no image, a mask of another size, or none where
      nothing else says what to draw.
  """
  image = _decode("image", upload.image)
  name, file = ("mask", upload.mask) if upload.mask else ("image", upload.image)
  hidden = _hidden(name, file)
  if hidden is None and not keeps_some:
    message = "expected transparent pixels where to draw, in it or in a 'mask'"
    raise _invalid("image", message)
  mask = np.full((image.height, image.width), True) if hidden is None else hidden
  if mask.shape != (image.height, image.width):
    found = text((mask.shape[1], mask.shape[0]))
    raise _invalid("mask", f"it is {found}, the image {text(image.size)} pixels")
  warnings = []
  if image.size != size:
    warnings = [f"'image' {text(image.size)}: scaled and cropped to {text(size)}."]
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    image, white = (
      ImageOps.fit(part, size, Image.Resampling.LANCZOS) for part in (image, white)
    )
    mask = np.asarray(white) >= 128
  if not mask.any():
    raise _invalid(name, "it is nowhere transparent: nothing is to be drawn")
  return Canvas(np.asarray(image), mask), warnings


def _decode(name: str, file: bytes) -> Image.Image:
  with _opened(name, file) as (decoder, stream):
    return decoder.decode(stream, name)


def _hidden(name: str, file: bytes) -> np.ndarray | None:
  """Returns where to draw, bool [H, W]: transparent, or white in a mask without."""
  with _opened(name, file) as (decoder, stream):
    return decoder.hidden(stream, name, is_mask=name == "mask")


@contextlib.contextmanager
def _opened(name: str, file: bytes) -> Iterator[tuple[ImageDecoder, io.BytesIO]]:
  """Gives a decoder and the file; bounds its pixels, and refuses what is no image."""
  decoder, stream = ImageDecoder(), io.BytesIO(file)
  try:
    width, height = decoder.size(stream, name)
    if width * height > MAX_PIXELS:
      found = f"{text((width, height))}, more than {MAX_PIXELS} pixels"
      raise BadImage(f"{name}: {found}")
    yield decoder, io.BytesIO(file)
  except BadImage as error:
    raise _invalid(name, str(error).removeprefix(f"{name}: ")) from error


def _invalid(name: str, message: str) -> APIError:
  text = f"Invalid '{name}': {message}."
  return APIError(400, text, code=f"invalid_{name}", param=name)
