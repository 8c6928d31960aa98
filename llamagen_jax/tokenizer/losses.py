"""Loss terms of the tokenizer, as free functions. Pictures are [B, H, W, 3]."""

import dataclasses

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the generator's loss; the quantizer's are in TokenizerConfig."""

  reconstruction: str = "l2"  # l2 | l1
  reconstruction_weight: float = 1.0

  def __post_init__(self):
    if self.reconstruction not in ("l1", "l2"):
      raise UserError(f"loss.reconstruction={self.reconstruction!r}: expected l1 or l2")


def reconstruction_loss(
  config: LossConfig, images: jax.Array, reconstructions: jax.Array
) -> jax.Array:
  """Mean absolute or squared error over all values, weighted."""
  error = images - reconstructions
  values = jnp.abs(error) if config.reconstruction == "l1" else error**2
  return config.reconstruction_weight * jnp.mean(values)
