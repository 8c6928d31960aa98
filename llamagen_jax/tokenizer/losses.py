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
  perceptual_weight: float = 0.0  # 0 = not computed
  perceptual: str = "lpips"  # lpips | resnet50 (VQGAN+: distance of its logits)
  lpips: str = ""  # file of LPIPS's weights, or VGG16's and LPIPS's with a comma
  resnet: str = ""  # file of ResNet50's weights, for resnet50
  adversarial_weight: float = 0.0  # 0 = no discriminator at all
  generator: str = "hinge"  # hinge | non-saturating
  discriminator: str = "hinge"  # hinge | vanilla | non-saturating
  adaptive_weight: bool = False  # balance the gradients of the last layer
  disc_start: int = 0  # step from which the discriminator acts on the generator
  disc_warmup_steps: int = 0  # steps before that in which it is trained alone
  lecam_weight: float = 0.0  # of LeCAM's term for the discriminator; 0 = none
  lecam_decay: float = 0.999  # of the averages of logits that LeCAM compares with

  def __post_init__(self):
    for name, known in (
      ("reconstruction", ("l1", "l2")),
      ("perceptual", ("lpips", "resnet50")),
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


def averaged_logits(
  means: dict[str, jax.Array], logits: dict[str, jax.Array], decay: float
) -> dict[str, jax.Array]:
  """Returns LeCAM's running means of logits by name, after the means of a batch.

  Logits that are not finite change none.
  """

  def averaged(name: str) -> jax.Array:
    mean, new = means[name], logits[name]
    return jnp.where(jnp.isfinite(new), mean + (1 - decay) * (new - mean), mean)

  return {name: averaged(name) for name in means}


def lecam_loss(
  real: jax.Array, fake: jax.Array, real_mean: jax.Array, fake_mean: jax.Array
) -> jax.Array:
  """Returns LeCAM's regularisation (arXiv 2104.03310), equation 5, one-sided.

  As VQGAN+ and IBQ have it: mean relu(real - fake_mean)^2 + mean relu(real_mean -
  fake)^2, which keeps logits from running away from the averages of the other side.

  Args:
    real: logits of images.
    fake: logits of reconstructions.
    real_mean: running average of the former's mean.
    fake_mean: running average of the latter's mean.
  """
  above = jax.nn.relu(real - fake_mean) ** 2
  below = jax.nn.relu(real_mean - fake) ** 2
  return jnp.mean(above) + jnp.mean(below)


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
