"""The size that a request asks for, and the one that it gets."""

from collections.abc import Sequence
import re

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.sides import distance

POLICIES = ("exact", "nearest", "resize")
LARGEST_SIDE = 4096  # of a resized image, in pixels
SIZE = re.compile(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})")

Size = tuple[int, int]  # width, height


def choose_size(
  asked: str | None, own: Sequence[Size], policy: str
) -> tuple[Size, Size, list[str]]:
  """Returns the size to generate, that of the images of a response, and warnings.

  Args:
    asked: the request's `size`.
    own: the sizes that the model generates; the first is the default.
    policy: exact: refuse every other size. nearest: the one of its own sizes that is
      nearest in shape instead. resize: scale and crop those images to the size asked
      for.

  Raises:
    APIError: 400 for a size that cannot be had.
  """
  if asked in (None, "", "auto"):
    return own[0], own[0], []
  match = SIZE.fullmatch(asked.strip())
  if match is None:
    raise _invalid(asked, f"WIDTHxHEIGHT, such as '{text(own[0])}', or 'auto'")
  size = int(match[1]), int(match[2])
  if size in own:
    return size, size, []
  if policy == "exact":
    raise _invalid(asked, " or ".join([*(f"'{text(o)}'" for o in own), "'auto'"]))
  nearest = min(own, key=lambda o: distance(o, size))
  if policy == "nearest":
    known = " or ".join(map(text, own))
    return nearest, nearest, [f"'size' {text(size)}: this model generates {known}."]
  if max(size) > LARGEST_SIDE:
    raise _invalid(asked, f"at most {LARGEST_SIDE}x{LARGEST_SIDE}")
  return nearest, size, [f"'size' {text(size)}: resized from {text(nearest)}."]


def text(size: Size) -> str:
  return f"{size[0]}x{size[1]}"


def _invalid(asked: str, expected: str) -> APIError:
  message = f"Invalid size '{asked[:40]}': expected {expected}."
  return APIError(400, message, code="invalid_value", param="size")
