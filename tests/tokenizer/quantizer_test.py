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
  rows = lookup(CONFIG, jnp.array([3, 256, -1]), codebook)
  assert np.isfinite(rows[0]).all() and np.isnan(rows[1:]).all()


def test_the_gradient_of_normalising_is_finite_at_zero():
  x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(l2_normalize(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) ** 2 + l2_normalize(x)))(x)
  assert (gradient[0] == 0).all() and np.isfinite(gradient).all()


def test_index_backpropagation_equals_the_original():
  """Losses, and gradients of sum(z_q w) + the quantizer's loss + 0.05 entropy."""
  golden = parity.golden()
  codebook = parity.synthesize(parity.beyond_manifest()["ibq_f16"])[
    "quantize.embedding.weight"
  ]
  config = TokenizerConfig(
    (1,), codebook_size=48, codebook_dim=40, latent_width=40, l2_norm=False,
    quantizer="ibq", entropy_ratio=0.05,
  )  # fmt: skip
  z, w = (golden[f"ibq_{name}"].transpose(0, 2, 3, 1) for name in "zw")

  def total(z, codebook):
    found = quantize(config, z, codebook)
    return jnp.sum(found.latents * w) + sum(found.losses.values()), found.losses

  grads, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(z, codebook)
  quant, _, _, entropy = golden["ibq_losses"]
  np.testing.assert_allclose(
    losses["codebook"] + losses["commitment"], quant, rtol=1e-5
  )
  np.testing.assert_allclose(losses["entropy"], 0.05 * entropy, rtol=1e-5)
  expected = golden["ibq_grad_z"].transpose(0, 2, 3, 1), golden["ibq_grad_codebook"]
  for found, wanted in zip(grads, expected, strict=True):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5)
