"""Loss terms of the tokenizer, as free functions. Images are [B, H, W, 3].

The whole, VQGAN (arXiv 2012.09841), section 3.1, as LlamaGen weighs it: the generator
minimises reconstruction + perceptual + w * adversarial + the quantizer's terms
(`quantizer.quantize`), the discriminator one of the discriminator losses.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError

ADAPTIVE_EPS = 1e-4
LARGEST_ADAPTIVE_WEIGHT = 1e4


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the generator's loss; the quantizer's are in TokenizerConfig."""

  reconstruction: str = "l2"  # l2 | l1
  reconstruction_weight: float = 1.0
  perceptual_weight: float = 0.0  # of LPIPS; 0 = not computed
  lpips: str = ""  # file of LPIPS's weights, or VGG16's and LPIPS's with a comma
  adversarial_weight: float = 0.0  # 0 = no discriminator at all
  generator: str = "hinge"  # hinge | non-saturating
  discriminator: str = "hinge"  # hinge | vanilla | non-saturating
  adaptive_weight: bool = False  # balance the gradients of the last layer
  disc_start: int = 0  # step from which the discriminator acts on the generator
  disc_warmup_steps: int = 0  # steps before that in which it is trained alone

  def __post_init__(self):
    for name, known in (
      ("reconstruction", ("l1", "l2")),
      ("generator", ("hinge", "non-saturating")),
      ("discriminator", ("hinge", "vanilla", "non-saturating")),
    ):
      if getattr(self, name) not in known:
        raise UserError(
          f"loss.{name}={getattr(self, name)!r}: expected {' or '.join(known)}"
        )
    if self.disc_warmup_steps > self.disc_start:
      raise UserError(
        f"loss.disc_warmup_steps={self.disc_warmup_steps}: more than"
        f" loss.disc_start={self.disc_start}"
      )


def reconstruction_loss(
  config: LossConfig, images: jax.Array, reconstructions: jax.Array
) -> jax.Array:
  """Returns the mean absolute or squared error over all values, weighted."""
  error = images - reconstructions
  values = jnp.abs(error) if config.reconstruction == "l1" else error**2
  return config.reconstruction_weight * jnp.mean(values)


def generator_loss(kind: str, fake: jax.Array) -> jax.Array:
  """Returns the generator's loss for the logits of reconstructions.

  hinge: -mean(D(fake)), Geometric GAN (arXiv 1705.02894), equation 13;
  non-saturating: -mean(log sigmoid(D(fake))), GAN (arXiv 1406.2661), section 3.
  """
  return -jnp.mean(fake) if kind == "hinge" else jnp.mean(jax.nn.softplus(-fake))


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
  """Returns the discriminator's loss for logits of images and of reconstructions.

  hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2, Geometric GAN (arXiv
  1705.02894), equation 12; vanilla: (mean softplus(-real) + mean softplus(fake)) / 2,
  GAN (arXiv 1406.2661), equation 1, which non-saturating shares: the two games differ
  in the generator's loss only.
  """
  if kind == "hinge":
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
  return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


def adaptive_weight(
  likelihood_grad: jax.Array, adversarial_grad: jax.Array
) -> jax.Array:
  """Returns the weight that balances the two gradients (VQGAN, equation 7).

  Args:
    likelihood_grad: of reconstruction + perceptual, with respect to the kernel of
      the decoder's last convolution.
    adversarial_grad: of the unweighted adversarial loss, to the same.

  Returns: scalar in [0, 1e4], without a gradient.
  """
  norms = (jnp.linalg.norm(g.ravel()) for g in (likelihood_grad, adversarial_grad))
  likelihood, adversarial = norms
  weight = likelihood / (adversarial + ADAPTIVE_EPS)
  return jax.lax.stop_gradient(jnp.clip(weight, 0.0, LARGEST_ADAPTIVE_WEIGHT))
