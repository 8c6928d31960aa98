import jax
import numpy as np

from llamagen_jax import pictures
from tests import parity


def test_bicubic_resizing_equals_the_original():
  golden = parity.golden()
  resized = jax.jit(pictures.resize_bicubic, static_argnums=1)(golden["bicubic_in"], 16)
  np.testing.assert_allclose(resized, golden["bicubic_out"], atol=2e-6)


def test_resizing_to_the_same_side_changes_nothing():
  images = parity.golden()["bicubic_in"]
  np.testing.assert_array_equal(pictures.resize_bicubic(images, 24), images)


def test_uint8_conversion_equals_the_original():
  golden = parity.golden()
  found = pictures.to_uint8(golden["uint8_in"])
  np.testing.assert_array_equal(found, golden["uint8_out"])
