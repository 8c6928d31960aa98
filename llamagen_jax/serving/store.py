"""Finished images as base64, or as files that have a URL."""

import base64
import pathlib
import secrets

import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.schema import Image, ImageRequest

URL_PATH = "/images"


class Store:
  """Where images with a URL go; without a folder there are none.

  Names are random and long: who knows one may see the image, nobody can guess it.
  Files stay until the operator deletes them.
  """

  def __init__(self, folder: pathlib.Path | None = None):
    self.folder = folder
    if folder is not None:
      try:
        folder.mkdir(parents=True, exist_ok=True)
      except OSError as error:
        raise UserError(f"--store={folder}: {error.strerror}") from error

  def check(self, body: ImageRequest) -> None:
    if body.response_format == "url" and self.folder is None:
      message = "This server keeps no images (--store); ask for 'b64_json'."
      raise APIError(400, message, code="invalid_value", param="response_format")

  def image(
    self, image_model: ImageModel, image: np.ndarray, body: ImageRequest, root: str
  ) -> Image:
    """uint8 [H, W, 3] -> base64, or a URL below the server's `root`."""
    if body.response_format != "url":
      return Image(b64_json=self.b64(image_model, image, body))
    name = f"{secrets.token_urlsafe(24)}.{body.output_format or 'png'}"
    part = self.folder / f".{name}.part"
    part.write_bytes(image_model.encode(image, body))
    part.rename(self.folder / name)
    return Image(url=f"{root.rstrip('/')}{URL_PATH}/{name}")

  def b64(self, image_model: ImageModel, image: np.ndarray, body: ImageRequest) -> str:
    return base64.b64encode(image_model.encode(image, body)).decode()
