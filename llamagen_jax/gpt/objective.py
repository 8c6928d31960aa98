"""What a step minimises, and over how many slices of the batch it is summed."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import constrain

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The published recipe is plain cross-entropy of the whole batch at once."""

  label_smoothing: float = 0.0  # share of the target spread over all codes
  z_loss: float = 0.0  # weight of log(sum(exp(logits)))**2 (arXiv 2204.02311, sec. 5)
  accumulate: int = 1  # slices of the batch that go through the model in turn

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1 or self.z_loss < 0 or self.accumulate < 1:
      raise UserError(
        "objective: expected 0 <= label_smoothing < 1, z_loss >= 0, accumulate >= 1;"
        f" found {self}"
      )


def cross_entropy(logits_BTV: jax.Array, codes_BT: jax.Array) -> jax.Array:
  """-log p of every code, float32 [B, T].

  The code's logit is picked by a comparison, not by an index: that stays on the
  chip that holds its part of a sharded vocabulary, and fuses with the sum of the
  exponentials. A TPU takes a gather for the sparse core, and moves the logits there.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen_BTV = codes_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
  logit_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - logit_BT


def objective(
  config: ObjectiveConfig, logits_BTV: jax.Array, loss_BT: jax.Array
) -> jax.Array:
  """What is minimised in place of the cross-entropy `loss_BT`, [B, T]."""
  total_BT = loss_BT
  if config.label_smoothing or config.z_loss:
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  if config.label_smoothing:
    uniform_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
    total_BT = total_BT + config.label_smoothing * (uniform_BT - loss_BT)
  if config.z_loss:
    total_BT = total_BT + config.z_loss * log_z_BT**2
  return total_BT


def sample_weights(batch: Batch) -> jax.Array:
  """What each sample counts in the mean: float32 [B], sum 1, or 0 if none is valid."""
  valid_B = batch.get("valid")
  if valid_B is None:
    size = batch["codes"].shape[0]
    return jnp.full((size,), 1 / size, jnp.float32)
  return valid_B / jnp.maximum(valid_B.sum(), 1)


def accumulated(
  loss_and_grads: Callable[[Batch, jax.Array], tuple[Any, Any]],
  batch: Batch,
  slices: int,
) -> tuple[Any, Any]:
  """The sum of `loss_and_grads(slice, number)` over interleaved slices of the batch.

  Interleaved, so that every chip keeps the samples it has.
  """
  if slices == 1:
    return loss_and_grads(batch, jnp.zeros((), jnp.int32))
  size = batch["codes"].shape[0]
  if size % slices:
    raise UserError(
      f"objective.accumulate={slices} does not divide data.batch_size={size}"
    )

  def split(x):
    x = x.reshape(size // slices, slices, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  def add(total, part):
    return jax.tree.map(jnp.add, total, loss_and_grads(*part)), None

  parts = jax.tree.map(split, batch), jnp.arange(slices)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss_and_grads, *first)
  )
  return jax.lax.scan(add, zeros, parts)[0]
