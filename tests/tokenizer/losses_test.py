import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.tokenizer.losses import (
  LossConfig,
  adaptive_weight,
  discriminator_loss,
  generator_loss,
  lecam_loss,
  reconstruction_loss,
)

REAL, FAKE = np.array([[2.0], [0.5]]), np.array([[-3.0], [1.0]])


def log_sigmoid(x):
  return np.log(1 / (1 + np.exp(-x)))


def test_generator_losses():
  assert generator_loss("hinge", FAKE) == pytest.approx(1.0)
  expected = -np.mean(log_sigmoid(FAKE))
  assert generator_loss("non-saturating", FAKE) == pytest.approx(expected)


def test_discriminator_losses():
  assert discriminator_loss("hinge", REAL, FAKE) == pytest.approx((0.25 + 1.0) / 2)
  expected = -(np.mean(log_sigmoid(REAL)) + np.mean(log_sigmoid(-FAKE))) / 2
  for kind in ("vanilla", "non-saturating"):
    assert discriminator_loss(kind, REAL, FAKE) == pytest.approx(expected)


def test_lecam_counts_logits_beyond_the_other_sides_average():
  # relu(2 + 1)^2, relu(.5 + 1)^2; relu(.5 + 3)^2, relu(.5 - 1)^2 = 0
  expected = (9 + 2.25) / 2 + 12.25 / 2
  assert lecam_loss(REAL, FAKE, 0.5, -1.0) == pytest.approx(expected)
  assert lecam_loss(REAL, FAKE, -4.0, 3.0) == 0


def test_reconstruction_losses():
  x, y = jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2, 3), 3.0)
  assert reconstruction_loss(LossConfig("l2", 2.0), x, y) == 18
  assert reconstruction_loss(LossConfig("l1", 2.0), x, y) == 6


def test_adaptive_weight_is_a_ratio_of_norms_within_bounds():
  ones = jnp.ones((2, 2))
  assert adaptive_weight(3 * ones, ones) == pytest.approx(6 / (2 + 1e-4))
  assert adaptive_weight(3 * ones, 0 * ones) == 1e4


@pytest.mark.parametrize(
  "field, value", [("reconstruction", "l3"), ("perceptual", "vgg"),
                   ("generator", "vanilla"), ("discriminator", "relu")],
)  # fmt: skip
def test_unknown_losses_are_named(field, value):
  with pytest.raises(UserError, match=f"loss.{field}='{value}': expected"):
    LossConfig(**{field: value})


def test_a_lead_before_the_first_step_is_named():
  with pytest.raises(
    UserError, match="loss.disc_warmup_steps=5: more than loss.disc_start=3"
  ):
    LossConfig(disc_start=3, disc_warmup_steps=5)
