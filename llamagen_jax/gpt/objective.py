"""What a step minimises, and over how many slices of the batch it is summed.

Beside the published recipe's cross-entropy: next-patch prediction (arXiv 2412.15321),
random orders that are annealed to raster order (RAR, arXiv 2411.00776), guidance-free
training (GFT, arXiv 2501.15420) and condition contrastive alignment (CCA, arXiv
2410.09347). All are functions of logits; `training.gpt_step` runs the model.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import patch_config
from llamagen_jax.parallel.mesh import constrain

Batch = dict[str, jax.Array]
KINDS = ("likelihood", "guidance-free", "contrastive")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The published recipe is plain cross-entropy of the whole batch at once."""

  label_smoothing: float = 0.0  # share of the target spread over all codes
  z_loss: float = 0.0  # weight of log(sum(exp(logits)))**2 (arXiv 2204.02311, sec. 5)
  accumulate: int = 1  # slices of the batch that go through the model in turn
  kind: str = "likelihood"  # likelihood | guidance-free (GFT) | contrastive (CCA)
  # First phases of a run, (side of a patch of codes, steps); single codes after them.
  patch_phases: tuple[tuple[int, int], ...] = ()
  # Random orders with probability 1 before the first step, falling to 0 at the second.
  random_order: tuple[int, int] = (0, 0)
  # Largest share of an image's codes that are read as random ones; targets stay.
  code_noise: float = 0.0
  contrastive_beta: float = 0.02  # of 576 codes; other sizes scale it by 576 / codes
  contrastive_lambda: float = 300.0  # weight of the wrong labels

  def __post_init__(self):
    # JSON has lists.
    object.__setattr__(self, "patch_phases", tuple(map(tuple, self.patch_phases)))
    object.__setattr__(self, "random_order", tuple(self.random_order))
    if not 0 <= self.label_smoothing < 1 or self.z_loss < 0 or self.accumulate < 1:
      raise UserError(
        "objective: expected 0 <= label_smoothing < 1, z_loss >= 0, accumulate >= 1;"
        f" found {self}"
      )
    if not 0 <= self.code_noise <= 1:
      raise UserError(f"objective.code_noise={self.code_noise}: expected 0 .. 1")
    if self.kind not in KINDS:
      raise UserError(
        f"objective.kind={self.kind!r}: expected one of {', '.join(KINDS)}"
      )
    if any(len(phase) != 2 or min(phase) < 1 for phase in self.patch_phases):
      raise UserError(
        f"objective.patch_phases={self.patch_phases}: expected pairs (side, steps)"
      )
    if len(self.random_order) != 2 or not 0 <= self.random_order[0] <= self.until:
      raise UserError(
        f"objective.random_order={self.random_order}: expected (steps of random"
        " orders, step at which all are raster order)"
      )
    if self.kind != "likelihood" and (self.patch_phases or self.until):
      raise UserError(
        f"objective.kind={self.kind!r} has no patch_phases and no random_order"
      )
    if self.kind == "contrastive" and self.code_noise:
      raise UserError("objective.kind='contrastive' has no code_noise")

  @property
  def until(self) -> int:
    """The step from which on all orders are raster order."""
    return self.random_order[1]

  def patch_starts(self) -> dict[int, int]:
    """Returns the side of a patch by the step that its phase begins with."""
    ends = itertools.accumulate(steps for _, steps in self.patch_phases)
    starts = [0, *ends]
    return dict(zip(starts, [*(side for side, _ in self.patch_phases), 1], strict=True))

  def phases(self) -> dict[int, "ObjectivePhase"]:
    """Returns the phases of a run by the step that each begins with."""
    sides = self.patch_starts()
    phases = {}
    for start in sorted({*sides, self.until}):
      side = sides[max(s for s in sides if s <= start)]
      phases[start] = ObjectivePhase(side, side == 1 and start < self.until)
    return phases

  def check(self, model: GPTConfig) -> None:
    """Refuses a model that the objective cannot train.

    Raises:
      UserError: patches that do not divide the grid, random orders without a target
        embedding, guidance-free training without its embedding.
    """
    for (side, _), grid in itertools.product(self.patch_phases, model.grids):
      patch_config(model.at(grid), side)
    if self.until and not model.target_embedding:
      raise UserError("objective.random_order: expected model.target_embedding=True")
    if self.until and model.condition != "class":
      raise UserError(
        "objective.random_order: expected model.condition='class', found 'caption'"
      )
    if self.kind == "guidance-free" and not model.guidance_embedding:
      raise UserError(
        "objective.kind='guidance-free': expected model.guidance_embedding=True"
      )
    if self.kind == "contrastive" and model.condition != "class":
      raise UserError("objective.kind='contrastive': expected model.condition='class'")


@dataclasses.dataclass(frozen=True)
class ObjectivePhase:
  """How the steps of a part of a run see an image; a compiled program of its own."""

  patch: int = 1  # side of the squares of codes that are one token each
  random_order: bool = False  # some rows are predicted in an order of their own

  def __str__(self) -> str:
    if self.patch > 1:
      return f"patches of {self.patch}x{self.patch} codes"
    return "random orders" if self.random_order else "single codes in raster order"


def noisy_codes(
  config: ObjectiveConfig, codes_BT: jax.Array, vocab_size: int, key: jax.Array
) -> jax.Array:
  """Replaces codes by random ones, a share of each image that is uniform up to a limit.

  A model that reads its own mistakes in sampling has seen mistakes then, and has to
  listen to the condition (noisy context learning, arXiv 2502.20388, section 3.3).
  """
  share_key, place_key, code_key = jax.random.split(key, 3)
  share_B1 = config.code_noise * jax.random.uniform(share_key, (len(codes_BT), 1))
  is_noise_BT = jax.random.bernoulli(place_key, share_B1, codes_BT.shape)
  noise_BT = jax.random.randint(code_key, codes_BT.shape, 0, vocab_size)
  return jnp.where(is_noise_BT, noise_BT, codes_BT)


def cross_entropy(logits_BTV: jax.Array, codes_BT: jax.Array) -> jax.Array:
  """Returns -log p of every code, float32 [B, T].

  The code's logit is picked by a comparison, not by an index: that stays on the
  chip that holds its part of a sharded vocabulary, and fuses with the sum of the
  exponentials. A TPU takes a gather for the sparse core, and moves the logits there.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen_BTV = codes_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
  logit_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - logit_BT


def patch_cross_entropy(logits_BTV: jax.Array, codes_BTN: jax.Array) -> jax.Array:
  """Returns the mean of -log p over the codes of every patch, float32 [B, T].

  One distribution predicts all codes of a patch.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  values_V = jnp.arange(logits_BTV.shape[-1])
  share_BTV = jnp.mean((codes_BTN[..., None] == values_V).astype(jnp.float32), axis=2)
  mean_BT = jnp.sum(share_BTV * logits_BTV, axis=-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - mean_BT


def random_orders(
  config: ObjectiveConfig, key: jax.Array, step: jax.Array, size: int, tokens: int
) -> jax.Array:
  """Returns a permutation a row, int32 [B, T], raster order for more and more rows.

  Args:
    config: `random_order` holds the schedule of the probability.
    key: of the step; the rows' permutations depend on it and their number alone.
    step: updates done.
    size: rows of the batch.
    tokens: codes of an image.
  """
  start, end = config.random_order
  share = jnp.clip((end - step) / max(1, end - start), 0.0, 1.0)

  def order(row):
    choose_key, order_key = jax.random.split(jax.random.fold_in(key, row))
    permuted_T = jax.random.permutation(order_key, tokens)
    use = jax.random.uniform(choose_key) < share
    return jnp.where(use, permuted_T, jnp.arange(tokens))

  return jax.vmap(order)(jnp.arange(size))


def guidance_free_logits(
  logits_BTV: jax.Array, null_BTV: jax.Array, beta_B: jax.Array
) -> jax.Array:
  """Returns the logits that are trained: beta of the model's, the rest of null's.

  GFT's equation 7. At `1 / beta` guidance the model's own logits are what classifier-
  free guidance makes of them; no gradient goes into the unconditional ones.
  """
  beta_B11 = beta_B[:, None, None]
  return beta_B11 * logits_BTV + (1 - beta_B11) * jax.lax.stop_gradient(null_BTV)


def contrastive_loss(
  config: ObjectiveConfig,
  right_B: jax.Array,
  wrong_B: jax.Array,
  alone_B: jax.Array,
  tokens: int,
) -> jax.Array:
  """Returns CCA's loss of every row, float32 [B].

  -log sigmoid(b r+) - lambda log sigmoid(-b r-), over max(lambda, 1). Rows without a
  contrast, that is without a label or with equal labels, have +b r- and weight 1
  in place of the second term.

  Args:
    config: b and lambda.
    right_B: r+, sum over the codes of log p - log p_reference with the image's label.
    wrong_B: r-, the same with another image's label.
    alone_B: rows without a contrast.
    tokens: codes of an image; b belongs to 576.
  """
  beta = config.contrastive_beta * 576 / tokens
  weight = config.contrastive_lambda
  right = jax.nn.log_sigmoid(beta * right_B)
  wrong = weight * jax.nn.log_sigmoid(-beta * wrong_B)
  second = jnp.where(alone_B, jax.nn.log_sigmoid(beta * wrong_B), wrong)
  return -(right + second) / max(weight, 1.0)


def objective(
  config: ObjectiveConfig, logits_BTV: jax.Array, loss_BT: jax.Array
) -> jax.Array:
  """Returns what is minimised in place of the cross-entropy `loss_BT`, [B, T]."""
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
  """Returns the samples' weights in the mean: float32 [B], sum 1, 0 if all are bad."""
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
  """Returns the sum of `loss_and_grads(slice, number)` over slices of the batch.

  They are interleaved, so that every chip keeps the samples it has.
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
