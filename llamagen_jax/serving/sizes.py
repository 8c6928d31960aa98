"""The size that a request asks for, and the one that it gets."""

import re

from llamagen_jax.serving.api_error import APIError

POLICIES = ("exact", "nearest", "resize")
LARGEST_SIDE = 4096  # of a resized image, in pixels
SIZE = re.compile(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})")

Size = tuple[int, int]  # width, height


def choose_size(asked: str | None, own: Size, policy: str) -> tuple[Size, list[str]]:
  """Returns the size of the images of a response, and warnings.

  Args:
    asked: the request's `size`.
    own: the size that the model generates.
    policy: exact: refuse every other size. nearest: the model's own size instead.
      resize: scale and crop its images to the size asked for.

  Raises:
    APIError: 400 for a size that cannot be had.
  """
  if asked in (None, "", "auto"):
    return own, []
  match = SIZE.fullmatch(asked.strip())
  if match is None:
    raise _invalid(asked, f"WIDTHxHEIGHT, such as '{text(own)}', or 'auto'")
  size = int(match[1]), int(match[2])
  if size == own:
    return own, []
  if policy == "exact":
    raise _invalid(asked, f"'{text(own)}' or 'auto'")
  if policy == "nearest":
    return own, [f"'size' {text(size)}: this model generates {text(own)}."]
  if max(size) > LARGEST_SIDE:
    raise _invalid(asked, f"at most {LARGEST_SIDE}x{LARGEST_SIDE}")
  return size, [f"'size' {text(size)}: resized from {text(own)}."]


def text(size: Size) -> str:
  return f"{size[0]}x{size[1]}"


def _invalid(asked: str, expected: str) -> APIError:
  message = f"Invalid size '{asked[:40]}': expected {expected}."
  return APIError(400, message, code="invalid_value", param="size")
