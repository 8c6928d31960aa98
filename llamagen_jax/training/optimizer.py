"""AdamW with the published recipe's decay mask, clip and schedules; Muon beside it."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers as MatrixAxes
from optax.contrib import scale_by_muon

from llamagen_jax.errors import UserError

KINDS = ("adamw", "muon")
LR_SCHEDULES = ("constant", "cosine", "wsd")
MUON_RMS = 0.2  # of an update, about that of Adam's, so that both share learning rates


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  lr: float  # for the batch size of the config; it is not rescaled
  schedule: str = "constant"  # constant | cosine | wsd (warm-up, stable, decay)
  warmup_steps: int = 0  # linear from 0; of wsd at the start of every phase
  final_lr: float = 0.0  # where the cosine and the phases of wsd end
  decay_share: float = 0.2  # last share of a phase of wsd, linear to final_lr
  kind: str = "adamw"  # adamw | muon (of the network's matrices; the rest by AdamW)
  b1: float = 0.9  # of Adam
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0  # global norm of the gradients
  ema: float = 0.0  # decay of the average of the weights; 0 = none is kept

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(
        f"optimizer.kind={self.kind!r}: expected one of {', '.join(KINDS)}"
      )
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
  matrix_axes: Callable[[Sequence[str]], MatrixAxes | None] = lambda names: None,
  decay_mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """Returns clip, moments, decoupled decay (arXiv 1711.05101), learning rate.

  Args:
    config: which moments, and their decays.
    schedule: from a step to its learning rate.
    matrix_axes: from the names of a leaf to the axes that make the matrices for
      Muon, the other ones count them; None = Adam takes the leaf.
    decay_mask: from parameters to True where they decay; None = all do.
  """
  c = config
  adam = optax.scale_by_adam(c.b1, c.b2, c.eps)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    adam if c.kind == "adamw" else _muon_or(adam, matrix_axes),
    optax.add_decayed_weights(c.weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def _muon_or(adam: optax.GradientTransformation, matrix_axes):
  """Returns Muon of matrices, scaled as arXiv 2502.16982 does, and Adam of the rest."""

  def map_axes(use, tree):
    def axes_of(path, leaf):
      names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
      return use(leaf, matrix_axes(names))

    return jax.tree_util.tree_map_with_path(axes_of, tree)

  def scaled(update, axes: MatrixAxes):
    larger = max(float(np.prod(np.take(update.shape, side))) for side in axes)
    return MUON_RMS * larger**0.5 * update

  muon = optax.chain(
    scale_by_muon(weight_dimension_numbers=lambda tree: map_axes(lambda _, a: a, tree)),
    optax.stateless(lambda updates, _: map_axes(scaled, updates)),
  )
  return optax.partition(
    {True: muon, False: adam},
    lambda params: map_axes(lambda _, axes: axes is not None, params),
  )


def all_finite(tree: Any) -> Any:
  """Returns a bool array: no leaf has an inf or a NaN, nor an overflowing norm."""
  return jnp.isfinite(optax.global_norm(tree))
