import json

import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.sides import (
  as_sides,
  grid_of,
  image_size_of,
  read_pixels,
  show_pixels,
)


@pytest.mark.parametrize(
  "value, sides", [(8, 8), ((8, 8), 8), ([4, 8], (4, 8)), ((8, 4), (8, 4))]
)
def test_a_square_is_one_number_and_files_keep_all(value, sides):
  found = as_sides(value, "grid")
  assert found == sides and type(found) is type(sides)
  assert as_sides(json.loads(json.dumps(found)), "grid") == sides


@pytest.mark.parametrize("value", [0, (4, 0), (4,), (4, 4, 4), 4.0, "4x8", None])
def test_other_values_are_named(value):
  with pytest.raises(UserError, match="^grid=.*: expected a side or .height, width.$"):
    as_sides(value, "grid")


def test_people_write_the_width_first():
  assert read_pixels("64x32") == (32, 64) and show_pixels((32, 64)) == "64x32"
  assert read_pixels("64") == read_pixels("64x64") == 64 and show_pixels(64) == "64x64"
  for text in ("", "0", "64x", "x64", "64x0", "6.4", "-64"):
    with pytest.raises(ValueError):
      read_pixels(text)


def test_codes_and_pixels():
  assert grid_of((32, 64), 8) == (4, 8) and image_size_of((4, 8), 8) == (32, 64)
  assert grid_of(64, 8) == 8 and image_size_of(8, 8) == 64
  with pytest.raises(UserError, match="64x36 is not a multiple .* downsampling 8"):
    grid_of((36, 64), 8)
