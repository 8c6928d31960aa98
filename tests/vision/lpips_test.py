import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.vision.lpips import lpips, shapes
from llamagen_jax.weights.files import write_weights
from llamagen_jax.weights.lpips import load_lpips, lpips_from_torch
from tests import parity


@pytest.fixture(scope="module")
def published():
  tensors = parity.state_dict("lpips_vgg16")
  return {n: np.abs(v) if n.startswith("lin") else v for n, v in tensors.items()}


@pytest.fixture(scope="module")
def distance():
  return jax.jit(lpips, static_argnums=3)


def images():
  return (
    np.tanh(parity.randn(f"disc/{name}", (2, 3, 64, 64))).transpose(0, 2, 3, 1)
    for name in "xy"
  )


def test_lpips_equals_the_original(published, distance):
  params = lpips_from_torch(published)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes())
  x, y = images()
  expected = parity.golden()["lpips_value"]
  np.testing.assert_allclose(distance(params, x, y, "float32"), expected, atol=1e-6)
  np.testing.assert_array_equal(distance(params, x, x, "float32"), 0)


def test_gradients_are_finite_where_all_features_are_zero(published):
  params = jax.tree.map(jnp.asarray, lpips_from_torch(published))
  params["conv1_2"]["bias"] -= 1e3  # dead from here on
  black = jnp.zeros((1, 16, 16, 3))
  grad = jax.grad(lambda x: jnp.sum(lpips(params, x, black, "float32")))(black + 0.1)
  assert np.isfinite(grad).all()


def test_both_layouts_of_files_are_read(published, tmp_path):
  combined, vgg, lins = (
    tmp_path / f"{name}.safetensors" for name in ("combined", "vgg16", "lin")
  )
  write_weights(combined, published)
  linear = {n: v for n, v in published.items() if n.startswith("lin")}
  write_weights(lins, linear)
  features = {
    f"features.{n.split('.', 2)[2]}": v for n, v in published.items() if n[0] == "n"
  }
  classifier = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
  write_weights(vgg, features | classifier)
  whole, apart = load_lpips(str(combined)), load_lpips(f"{lins},{vgg}")
  jax.tree.map(np.testing.assert_array_equal, whole, apart)
  for file, missing in ((lins, "VGG16"), (vgg, "lin0 .. lin4")):
    with pytest.raises(UserError, match=f"no weights.* {missing}.*vgg.pth"):
      load_lpips(str(file))


@pytest.mark.parametrize("files", ["", "nowhere/vgg.pth"])
def test_a_missing_file_says_where_to_get_it(files):
  with pytest.raises(UserError) as error:
    load_lpips(files)
  message = str(error.value)
  assert files in message
  assert "vgg16-397923af.pth" in message
  assert "perceptual_weight=0 trains without" in message
