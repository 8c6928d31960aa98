import functools

import jax
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.discriminator import (
  BatchNorm,
  DiscriminatorConfig,
  discriminate,
  init_discriminator,
)
from tests import parity
from tests.torch_discriminator import discriminator_from_torch, discriminator_to_torch


@pytest.mark.parametrize(
  "kind, weights", [("patchgan", "patchgan"), ("stylegan", "stylegan_disc_64")]
)
def test_discriminators_equal_the_original(kind, weights):
  config = DiscriminatorConfig(kind)
  tensors = parity.state_dict(weights)
  params = discriminator_from_torch(config, 64, tensors)
  images = np.tanh(parity.randn("disc/x", (2, 3, 64, 64))).transpose(0, 2, 3, 1)
  logits = jax.jit(functools.partial(discriminate, config))(params, images)
  expected = parity.golden()[f"{kind}_logits"]
  np.testing.assert_allclose(logits, expected, atol=2e-4)

  fresh = unbox(
    jax.eval_shape(functools.partial(init_discriminator, config, 64), jax.random.key(0))
  )
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, fresh)
  written = discriminator_to_torch(config, 64, params)
  for name, value in written.items():
    np.testing.assert_array_equal(value, tensors[name])
  left = set(tensors) - set(written)
  assert all("running_" in name for name in left)


def test_blur_pool_equals_the_original():
  tensors = parity.synthesize(parity.beyond_manifest()["vqganplus_disc"])
  config = DiscriminatorConfig("blurpool", width=32)
  params = discriminator_from_torch(config, 128, tensors)
  images = 0.5 * parity.randn("vqganplus_disc/image", (2, 3, 128, 128))
  logits = discriminate(config, params, images.transpose(0, 2, 3, 1))
  expected = parity.golden()["vqganplus_disc_logits"]
  np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_patchgan_starts_as_published():
  params = init_discriminator(DiscriminatorConfig(), 64, jax.random.key(0))
  params = unbox(params)
  assert np.std(params["conv_2"]["kernel"]) == pytest.approx(0.02, rel=0.05)
  assert np.mean(params["norm_3"]["scale"]) == pytest.approx(1, abs=0.01)
  assert np.std(params["norm_3"]["scale"]) == pytest.approx(0.02, rel=0.2)
  assert "bias" not in params["conv_1"]


def test_batch_norm_normalises_over_batch_and_positions():
  x = 3 + 2 * parity.randn("batch norm", (4, 5, 5, 3))
  norm = {"scale": np.ones(3), "bias": np.zeros(3)}
  y = BatchNorm().apply({"params": norm}, x)
  np.testing.assert_allclose(np.mean(y, axis=(0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(np.var(y, axis=(0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize(
  "config, side, words",
  [
    ({"kind": "stylegan"}, 96, "images of 96, expected a power of two"),
    ({"layers": 4}, 32, "discriminator.layers=4: images of 32 are too small"),
    ({"kind": "vgg"}, 32, "'vgg': expected patchgan or stylegan or blurpool"),
    ({"kind": "blurpool"}, 96, "images of 96, blurpool expects a multiple of 128"),
    ({"kind": "blurpool", "width": 8}, 128, "discriminator.width=8"),
  ],
)
def test_shapes_that_do_not_work_are_named(config, side, words):
  with pytest.raises(UserError, match=words):
    DiscriminatorConfig(**config).check_side(side)
