import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import TokenizerConfig
from llamagen_jax.tokenizer.quantizer import l2_normalize, lookup, quantize
from tests import parity

CONFIG = TokenizerConfig((1,), codebook_size=256, codebook_dim=8, entropy_ratio=0.1)


def test_training_quantizer_equals_the_original():
  golden = parity.golden()
  codebook = golden["quant_codebook"]
  found = quantize(CONFIG, golden["quant_z"], codebook)
  np.testing.assert_array_equal(found.codes, golden["quant_idx"])
  np.testing.assert_allclose(found.latents, golden["quant_zq"], atol=2e-6)
  losses = [float(found.losses[k]) for k in ("codebook", "commitment", "entropy")]
  np.testing.assert_allclose(losses, golden["quant_losses"], rtol=1e-5)


def test_gradients_go_straight_through_and_reach_the_codebook():
  z = parity.randn("z", (5, 8))
  codebook = parity.randn("codebook", (256, 8))
  pull = parity.randn("pull", (5, 8))

  def decoder_loss(z, codebook):
    return jnp.sum(quantize(CONFIG, z, codebook).latents * pull)

  grad_z, grad_codebook = jax.grad(decoder_loss, argnums=(0, 1))(z, codebook)
  expected = jax.grad(lambda z: jnp.sum(l2_normalize(z) * pull))(z)
  np.testing.assert_allclose(grad_z, expected, rtol=1e-5)
  assert (grad_codebook == 0).all()

  def codebook_loss(z, codebook):
    return quantize(CONFIG, z, codebook).losses["codebook"]

  grad_z, grad_codebook = jax.grad(codebook_loss, argnums=(0, 1))(z, codebook)
  assert (grad_z == 0).all()
  used = np.unique(quantize(CONFIG, z, codebook).codes)
  assert set(np.flatnonzero(np.abs(grad_codebook).sum(axis=1))) == set(used)


def test_no_entropy_is_computed_at_ratio_zero():
  config = dataclasses.replace(CONFIG, entropy_ratio=0.0)
  assert quantize(
    config, parity.randn("z", (5, 8)), parity.randn("c", (256, 8))
  ).losses["entropy"] == pytest.approx(0)


def test_codes_out_of_range_become_nan():
  codebook = parity.randn("codebook", (256, 8))
  rows = lookup(CONFIG, jnp.array([3, 256]), codebook)
  assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()
