import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax.evaluation.reconstruction import psnr, ssim
from tests import parity


@pytest.fixture
def pair():
  golden = parity.golden()
  return golden["ssim_x"][None], golden["ssim_y"][None]


def test_psnr_equals_scikit_image(pair):
  assert psnr(*pair)[0] == pytest.approx(float(parity.golden()["psnr"]), rel=1e-6)


@pytest.mark.parametrize("data_range", [1, 2])
def test_ssim_equals_scikit_image(pair, data_range):
  expected = float(parity.golden()[f"ssim_range{data_range}"])
  assert ssim(*pair, float(data_range))[0] == pytest.approx(expected, rel=1e-6)
  assert ssim(pair[0], pair[0], 1.0)[0] == pytest.approx(1, abs=1e-6)


def test_dark_and_bright_images_do_not_cancel(pair):
  x, y = np.float32(pair)
  np.testing.assert_allclose(ssim(x * 0.01, y * 0.01, 0.01), ssim(x, y, 1.0), rtol=1e-4)


def test_a_blank_image_does_not_make_the_mean_infinite():
  blank = jnp.ones((2, 8, 8, 3))
  np.testing.assert_allclose(psnr(blank, blank), 100, rtol=1e-5)
