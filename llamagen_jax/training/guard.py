"""Steps that are not taken: a loss that is no number, or one that jumps.

`optax.apply_if_finite` looks at the gradients alone, not at the updates made of them,
and takes bad steps after so many in a row; here they end the run.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llamagen_jax.errors import UserError
from llamagen_jax.training.optimizer import all_finite
from llamagen_jax.training.state import Metrics, Params, TrainState

WARMUP_STEPS = 100  # steps before a loss can count as a spike
LOSS_DECAY = 0.99  # of the running mean that a spike is measured against


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Which steps leave the weights as they were. The batch is lost, not repeated."""

  skip_nonfinite: bool = False  # loss, gradient or update is inf or NaN
  skip_spike: float = 0.0  # loss above its running mean by so many nats; 0 = never
  max_skipped_in_a_row: int = 10  # skipped steps in a row that end the run

  def __post_init__(self):
    if self.skip_spike < 0 or self.max_skipped_in_a_row < 1:
      raise UserError("guard: expected skip_spike >= 0 and max_skipped_in_a_row >= 1")

  @property
  def on(self) -> bool:
    return self.skip_nonfinite or self.skip_spike > 0


class GuardState(NamedTuple):
  """The optimizer's state and what the guard counts; alike with the guard off."""

  inner: Any  # state of the optimizer
  loss: jax.Array  # float32, running mean over the steps taken
  taken: jax.Array  # int32
  skipped: jax.Array  # int32
  in_a_row: jax.Array  # int32, skipped since the last step taken


def guard(
  optimizer: optax.GradientTransformation, config: GuardConfig
) -> optax.GradientTransformationExtraArgs:
  """Returns `optimizer`, whose `update(.., loss=)` does nothing on a bad step."""

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return GuardState(optimizer.init(params), jnp.zeros(()), zero, zero, zero)

  def update(grads, state, params=None, *, loss, **_):
    updates, inner = optimizer.update(grads, state.inner, params)
    bad = jnp.zeros((), bool)
    if config.skip_nonfinite:
      bad |= ~jnp.isfinite(loss) | ~all_finite(grads) | ~all_finite(updates)
    if config.skip_spike:
      bad |= (state.taken >= WARMUP_STEPS) & (loss > state.loss + config.skip_spike)

    def choose(old, new):
      return jax.tree.map(lambda o, n: jnp.where(bad, o, n), old, new)

    if config.on:
      inner = choose(state.inner, inner)
      updates = choose(jax.tree.map(jnp.zeros_like, updates), updates)
    mean = jnp.where(
      state.taken == 0, loss, LOSS_DECAY * state.loss + (1 - LOSS_DECAY) * loss
    )
    new = GuardState(
      inner,
      jnp.where(bad, state.loss, mean),
      state.taken + ~bad,
      state.skipped + bad,
      jnp.where(bad, state.in_a_row + 1, 0),
    )
    return updates, new

  return optax.GradientTransformationExtraArgs(init, update)


def guarded_update(
  config: GuardConfig,
  state: TrainState,
  grads: Params,
  loss: jax.Array,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> tuple[TrainState, jax.Array, Metrics]:
  """Returns the state after a guarded update, and what was skipped.

  Returns:
    the state, whose average of the weights stays on a skipped step; the update's
    global norm; and the counts of skipped steps, where the guard is on.
  """
  new, norm = state.update(grads, optimizer, ema_decay, loss=loss)
  if not config.on:
    return new, norm, {}
  in_a_row = new.opt_state.in_a_row
  ema = jax.tree.map(lambda o, n: jnp.where(in_a_row > 0, o, n), state.ema, new.ema)
  counts = {"skipped": new.opt_state.skipped, "skipped_in_a_row": in_a_row}
  return new.replace(ema=ema), norm, counts


def counts_of_both(generator: Metrics, discriminator: Metrics) -> Metrics:
  """Returns the counts of two guarded updates of a step; {} where the guard is off.

  A step that either network skips counts in a row.
  """
  if not generator:
    return {}
  in_a_row = "skipped_in_a_row"
  return generator | {
    "discriminator_skipped": discriminator["skipped"],
    in_a_row: jnp.maximum(generator[in_a_row], discriminator[in_a_row]),
  }
