"""One update of the transformer: recipe, state, loss and step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamagen_jax.data.loader import Batch
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import GPT, init_gpt
from llamagen_jax.gpt.objective import (
  ObjectiveConfig,
  accumulated,
  cross_entropy,
  objective,
  sample_weights,
)
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.training.guard import GuardConfig, guard
from llamagen_jax.training.loop import Metrics
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class CodeData:
  """The code shards to train on, and for captions the texts that go with them."""

  codes: str  # folder of shards
  eval_codes: str  # folder of held-out shards
  batch_size: int  # over all hosts
  workers: int = 0  # processes that read; 0 = threads
  texts: str = ""  # folder of features, or of captions if t5 is given
  eval_texts: str = ""
  t5: str = ""  # folder of the T5 that runs along in training
  t5_dtype: str = "bfloat16"
  short_share: float = 0.0  # probability of the short caption


@dataclasses.dataclass(frozen=True)
class GPTRecipe:
  """The whole config of a transformer's training."""

  model: GPTConfig
  data: CodeData
  optimizer: OptimizerConfig
  sampling: SamplingConfig  # stored in the bundle as its defaults
  mesh: MeshConfig
  run: RunConfig
  objective: ObjectiveConfig = ObjectiveConfig()
  guard: GuardConfig = GuardConfig()
  init_from: str = ""  # run or bundle whose weights a fresh run starts with


def schedule(recipe: GPTRecipe) -> optax.Schedule:
  """Returns the learning rate of every step."""
  return learning_rate(recipe.optimizer, recipe.run.steps)


def decay_mask(params: Any) -> Any:
  """Returns True for weights that decay: two axes or more, and trained.

  Layers are stacked along an axis of their own, which does not count.
  """

  def decays(path, leaf):
    names = [getattr(p, "key", None) for p in path]
    return leaf.ndim - ("layers" in names) >= 2 and "unconditional" not in names

  return jax.tree_util.tree_map_with_path(decays, params)


def condition_of(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
  """Returns the model's condition and its mask: labels, or features of captions."""
  if "label" in batch:
    return batch["label"], None
  return batch["features"], batch["mask"]


def init_state(recipe: GPTRecipe, key: jax.Array) -> TrainState:
  """Returns a fresh state with boxed parameters."""
  params = init_gpt(recipe.model, key)
  return TrainState.create(params, _optimizer(recipe), recipe.optimizer.ema > 0)


def train_step(
  recipe: GPTRecipe, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """Updates on codes [B, T] and labels [B], or features [B, P, C] and mask [B, P].

  The loss is the mean over the codes of all samples but those whose `valid` is 0.
  """
  c = recipe.model
  step_key = jax.random.fold_in(jax.random.key(recipe.run.seed), state.step)
  drop_key, dropout_key = jax.random.split(step_key)
  size = batch["codes"].shape[:1]
  batch = batch | {
    "drop": jax.random.bernoulli(drop_key, c.condition_dropout, size),
    "share": sample_weights(batch),
  }

  def loss_and_grads(part, number):
    key = jax.random.fold_in(dropout_key, number)
    grad = jax.value_and_grad(functools.partial(_loss, recipe), has_aux=True)
    (_, loss), grads = grad(state.params, part, key)
    return loss, grads

  loss, grads = accumulated(loss_and_grads, batch, recipe.objective.accumulate)
  return _updated(recipe, state, loss, grads)


def _loss(recipe: GPTRecipe, params: Any, batch: Batch, key: jax.Array):
  """Returns the minimised value, and the cross-entropy in nats a code."""
  condition, mask = condition_of(batch)
  logits_BTV = GPT(recipe.model, training=True).apply(
    {"params": params},
    batch["codes"],
    condition,
    mask,
    drop_B=batch["drop"],
    rngs={"dropout": key},
  )
  loss_BT = cross_entropy(logits_BTV, batch["codes"])
  minimised_BT = objective(recipe.objective, logits_BTV, loss_BT)
  minimised, loss = (
    jnp.sum(jnp.mean(x, 1) * batch["share"]) for x in (minimised_BT, loss_BT)
  )
  return minimised, loss


def _updated(
  recipe: GPTRecipe, state: TrainState, loss: jax.Array, grads: Any
) -> tuple[TrainState, Metrics]:
  """Returns the state after the update and the metrics of the step."""
  new, update_norm = state.update(
    grads, _optimizer(recipe), recipe.optimizer.ema, loss=loss
  )
  metrics = {
    "loss": loss,
    "grad_norm": optax.global_norm(grads),
    "update_norm": update_norm,
    "lr": schedule(recipe)(state.step),
  }
  if recipe.guard.on:
    skipped = new.opt_state.in_a_row > 0
    ema = jax.tree.map(lambda o, n: jnp.where(skipped, o, n), state.ema, new.ema)
    new = new.replace(ema=ema)
    metrics["skipped"] = new.opt_state.skipped
    metrics["skipped_in_a_row"] = new.opt_state.in_a_row
  return new, metrics


def _optimizer(recipe: GPTRecipe) -> optax.GradientTransformationExtraArgs:
  return guard(
    make_optimizer(recipe.optimizer, schedule(recipe), decay_mask), recipe.guard
  )
