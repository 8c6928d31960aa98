"""AdamW with the published recipe's decay mask, clip and schedules."""

from collections.abc import Callable
import dataclasses
from typing import Any

import optax

from llamagen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  lr: float  # for the batch size of the config; it is not rescaled
  schedule: str = "constant"  # constant | cosine
  warmup_steps: int = 0  # linear from 0
  final_lr: float = 0.0  # where the cosine ends
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0  # global norm of the gradients
  ema: float = 0.0  # decay of the average of the weights; 0 = none is kept

  def __post_init__(self):
    if self.schedule not in ("constant", "cosine"):
      raise UserError(
        f"optimizer.schedule={self.schedule!r}: expected constant or cosine"
      )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Step -> learning rate; linear warm-up, then constant or a half cosine."""
  c = config
  if c.schedule == "cosine":
    if c.warmup_steps >= steps:
      raise UserError(
        f"optimizer.warmup_steps={c.warmup_steps}: expected fewer than"
        f" run.steps={steps}"
      )
    return optax.warmup_cosine_decay_schedule(
      0.0 if c.warmup_steps else c.lr, c.lr, c.warmup_steps, steps, c.final_lr
    )
  if c.warmup_steps:
    return optax.linear_schedule(0.0, c.lr, c.warmup_steps)
  return optax.constant_schedule(c.lr)


def make_optimizer(
  config: OptimizerConfig, steps: int, decay_mask: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
  """Clip, Adam moments, decoupled decay (arXiv 1711.05101), learning rate."""
  c = config
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.scale_by_adam(c.b1, c.b2, c.eps),
    optax.add_decayed_weights(c.weight_decay, decay_mask),
    optax.scale_by_learning_rate(learning_rate(c, steps)),
  )
