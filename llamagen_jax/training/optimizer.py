"""AdamW with the published recipe's decay mask, clip and schedules."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from llamagen_jax.errors import UserError

LR_SCHEDULES = ("constant", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  lr: float  # for the batch size of the config; it is not rescaled
  schedule: str = "constant"  # constant | cosine | wsd (warm-up, stable, decay)
  warmup_steps: int = 0  # linear from 0; of wsd at the start of every phase
  final_lr: float = 0.0  # where the cosine and the phases of wsd end
  decay_share: float = 0.2  # last share of a phase of wsd, linear to final_lr
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0  # global norm of the gradients
  ema: float = 0.0  # decay of the average of the weights; 0 = none is kept

  def __post_init__(self):
    if self.schedule not in LR_SCHEDULES:
      known = ", ".join(LR_SCHEDULES)
      raise UserError(f"optimizer.schedule={self.schedule!r}: expected one of {known}")
    if not 0 < self.decay_share <= 1:
      raise UserError(
        f"optimizer.decay_share={self.decay_share}: expected 0 < decay_share <= 1"
      )


def learning_rate(
  config: OptimizerConfig, steps: int, phase_starts: Sequence[int] = ()
) -> optax.Schedule:
  """Returns the function from a step to its learning rate.

  Args:
    config: `wsd` is MiniCPM's schedule (arXiv 2404.06395) with a linear decay.
    steps: length of the run.
    phase_starts: steps at which `wsd` begins again with its warm-up.
  """
  c = config
  if c.schedule == "constant":
    if c.warmup_steps:
      return optax.linear_schedule(0.0, c.lr, c.warmup_steps)
    return optax.constant_schedule(c.lr)
  if c.schedule == "cosine":
    _check_warmup(c.warmup_steps, steps, "run.steps")
    return optax.warmup_cosine_decay_schedule(
      0.0 if c.warmup_steps else c.lr, c.lr, c.warmup_steps, steps, c.final_lr
    )
  starts = sorted({0, *phase_starts})
  ends = [*starts[1:], steps]
  phases = [_phase(c, end - start) for start, end in zip(starts, ends, strict=True)]
  return optax.join_schedules(phases, starts[1:])


def _phase(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns one phase of `wsd`: linear up, constant, linear down."""
  c = config
  decay = round(c.decay_share * steps)
  _check_warmup(c.warmup_steps + decay, steps + 1, "the phase's steps")
  up = optax.linear_schedule(0.0, c.lr, c.warmup_steps)
  parts = [up, optax.constant_schedule(c.lr)]
  parts.append(optax.linear_schedule(c.lr, c.final_lr, max(1, decay)))
  if not c.warmup_steps:
    return optax.join_schedules(parts[1:], [steps - decay])
  return optax.join_schedules(parts, [c.warmup_steps, steps - decay])


def _check_warmup(steps: int, limit: int, name: str) -> None:
  if steps >= limit:
    raise UserError(
      f"optimizer.warmup_steps (and the decay of wsd) take {steps} steps: expected"
      f" fewer than {name}={limit}"
    )


def make_optimizer(
  config: OptimizerConfig,
  schedule: optax.Schedule,
  decay_mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """Returns clip, Adam moments, decoupled decay (arXiv 1711.05101), learning rate."""
  c = config
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.scale_by_adam(c.b1, c.b2, c.eps),
    optax.add_decayed_weights(c.weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def all_finite(tree: Any) -> Any:
  """Returns a bool array: no leaf has an inf or a NaN, nor an overflowing norm."""
  return jnp.isfinite(optax.global_norm(tree))
