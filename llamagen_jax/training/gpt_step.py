"""One update of the transformer: recipe, state, loss and step."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers as MatrixAxes

from llamagen_jax.data.loader import Batch
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.gpt.model import GPT, patch_config, patches
from llamagen_jax.gpt.objective import (
  ObjectiveConfig,
  ObjectivePhase,
  accumulated,
  contrastive_loss,
  cross_entropy,
  guidance_free_logits,
  noisy_codes,
  objective,
  patch_cross_entropy,
  random_orders,
  sample_weights,
)
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.training.finetune import (
  TrainableConfig,
  frozen_stopped,
  init_params,
  merged,
  trainable,
)
from llamagen_jax.training.guard import GuardConfig, guard, guarded_update
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.sample_grid import ImagesConfig
from llamagen_jax.training.speed import Work
from llamagen_jax.training.state import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class CodeData:
  """The code shards to train on, and for captions the texts that go with them."""

  codes: str  # folder of shards; with commas several, one for each of the model's grids
  eval_codes: str  # folder of held-out shards, or several
  batch_size: int  # over all hosts
  workers: int = 0  # processes that read; 0 = threads
  texts: str = ""  # folder of features, or of captions if t5 is given; one for each
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
  train: TrainableConfig = TrainableConfig()
  images: ImagesConfig = ImagesConfig()
  guard: GuardConfig = GuardConfig()
  init_from: str = ""  # run or bundle whose weights a fresh run starts with

  def __post_init__(self):
    self.objective.check(self.model)
    self.sampling.check_model(self.model)
    if self.objective.kind == "contrastive" and not self.init_from:
      raise UserError(
        "objective.kind='contrastive': expected --init-from, the model to align, which"
        " is the reference, too"
      )


def schedule(recipe: GPTRecipe) -> optax.Schedule:
  """Returns the learning rate of every step."""
  r = recipe
  return learning_rate(r.optimizer, r.run.steps, tuple(r.objective.patch_starts()))


def work(recipe: GPTRecipe, patch: int) -> Work:
  """Returns the tokens and model FLOPs of a step on patches of codes."""
  r, size = recipe, recipe.data.batch_size
  model = patch_config(r.model, patch)
  # A pass without gradient is a third of a step: GFT's unconditional one; CCA has a
  # reference, and two labels an image.
  passes = {"likelihood": 1.0, "guidance-free": 4 / 3, "contrastive": 8 / 3}
  flops = train_flops(model, size) * passes[r.objective.kind]
  return Work(size * model.length, flops)


def decay_mask(params: Any) -> Any:
  """Returns True for weights that decay: two axes or more, and trained.

  Layers are stacked along an axis of their own, which does not count.
  """

  def decays(path, leaf):
    names = [getattr(p, "key", None) for p in path]
    return leaf.ndim - ("layers" in names) >= 2 and "unconditional" not in names

  return jax.tree_util.tree_map_with_path(decays, params)


def matrix_axes(names: Sequence[str]) -> MatrixAxes | None:
  """Returns the axes of a layer's matrices; queries, keys and values are one each."""
  axes = {
    ("attention", "qkv"): MatrixAxes((1,), (2, 4)),  # [layer, D, K, G + 2, H]
    ("attention", "out"): MatrixAxes((1, 2, 3), (4,)),  # [layer, K, G, H, D]
    ("ffn", "in"): MatrixAxes((1,), (3,)),  # [layer, D, 2, F]
    ("ffn", "out"): MatrixAxes((1,), (2,)),  # [layer, F, D]
  }
  return axes.get(tuple(names[-2:])) if names[0] == "layers" else None


def condition_of(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
  """Returns the model's condition and its mask: labels, or features of captions."""
  if "label" in batch:
    return batch["label"], None
  return batch["features"], batch["mask"]


def init_state(recipe: GPTRecipe, key: jax.Array) -> TrainState:
  """Returns a fresh state with boxed parameters."""
  r = recipe
  params = init_params(r.model, r.train, key)
  state = TrainState.create(params, _optimizer(r), r.optimizer.ema > 0)
  if r.objective.kind == "contrastive":
    state = state.replace(reference=jax.tree.map(jnp.copy, params))
  return state


def train_step(
  recipe: GPTRecipe,
  state: TrainState,
  batch: Batch,
  *,
  phase: ObjectivePhase = ObjectivePhase(),
) -> tuple[TrainState, Metrics]:
  """Updates on codes [B, T] and labels [B], or features [B, P, C] and mask [B, P].

  The loss is the mean over the codes of all samples but those whose `valid` is 0.

  Args:
    recipe: the config.
    state: before the update.
    batch: of the data.
    phase: of the objective.
  """
  r, c = recipe, recipe.model
  step_key = jax.random.fold_in(jax.random.key(r.run.seed), state.step)
  drop_key, dropout_key = jax.random.split(step_key)
  size = batch["codes"].shape[0]
  drop_B = jax.random.bernoulli(drop_key, c.condition_dropout, (size,))
  batch = batch | {"drop": drop_B, "share": sample_weights(batch)}
  extra_key = jax.random.fold_in(step_key, 1)
  if r.objective.kind == "guidance-free":
    beta_B = jax.random.uniform(extra_key, (size,))
    batch["beta"] = jnp.where(drop_B, 1.0, beta_B)
  if phase.random_order:
    batch["order"] = random_orders(
      r.objective, extra_key, state.step, size, c.image_tokens
    )

  batch["read"] = batch["codes"]
  if r.objective.code_noise:
    noise_key = jax.random.fold_in(step_key, 2)
    batch["read"] = noisy_codes(r.objective, batch["codes"], c.vocab_size, noise_key)

  def loss_and_grads(part, number):
    key = jax.random.fold_in(dropout_key, number)

    def loss(params):
      values_B, metrics_B = _losses(r, params, state.reference, part, key, phase.patch)
      means = jax.tree.map(lambda x: jnp.sum(x * part["share"]), metrics_B)
      return jnp.sum(values_B * part["share"]), means

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return metrics, grads

  metrics, grads = accumulated(loss_and_grads, batch, r.objective.accumulate)
  return _updated(r, state, metrics, grads)


def _losses(
  recipe: GPTRecipe,
  params: Any,
  reference: Any,
  batch: Batch,
  key: jax.Array,
  patch: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the minimised value of every sample [B], and metrics to average, [B]."""
  r = recipe
  params = merged(r.train, frozen_stopped(r.train, params))
  if r.objective.kind == "contrastive":
    return _contrastive(r, params, reference, batch, key)
  condition, mask = condition_of(batch)
  codes_BT, order_BT, beta_B = (batch.get(n) for n in ("codes", "order", "beta"))

  def logits(training, drop_B, beta_B, params=params):
    return GPT(r.model, training).apply(
      {"params": params}, batch["read"], condition, mask, drop_B=drop_B,
      guidance_beta=beta_B, order_BT=order_BT, patch=patch, rngs={"dropout": key},
    )  # fmt: skip

  logits_BTV = logits(True, batch["drop"], beta_B)
  if r.objective.kind == "guidance-free":
    everyone = jnp.ones_like(batch["drop"])
    fixed = jax.lax.stop_gradient(params)
    null_BTV = logits(False, everyone, jnp.ones_like(beta_B), fixed)
    logits_BTV = guidance_free_logits(logits_BTV, null_BTV, beta_B)
  if order_BT is not None:
    codes_BT = jnp.take_along_axis(codes_BT, order_BT, axis=1)
  if patch == 1:
    loss_BT = cross_entropy(logits_BTV, codes_BT)
  else:
    loss_BT = patch_cross_entropy(logits_BTV, patches(codes_BT, r.model.grid, patch))
  minimised_BT = objective(r.objective, logits_BTV, loss_BT)
  return jnp.mean(minimised_BT, axis=1), {"loss": jnp.mean(loss_BT, axis=1)}


def _contrastive(
  recipe: GPTRecipe, params: Any, reference: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns CCA's loss: own labels against those of the batch's next images.

  Dropout acts on both networks, as it does in the published recipe.
  """
  r, codes_BT, label_B = recipe, batch["codes"], batch["label"]
  wrong_B = jnp.roll(label_B, -1)
  # Pairs of neighbours, so that no image leaves its chip.
  labels = jnp.stack([label_B, wrong_B], axis=1).reshape(-1)
  codes, drop = (jnp.repeat(x, 2, axis=0) for x in (codes_BT, batch["drop"]))

  def log_likelihood(params, key):
    logits = GPT(r.model, training=True).apply(
      {"params": params}, codes, labels, drop_B=drop, rngs={"dropout": key}
    )
    return -jnp.sum(cross_entropy(logits, codes), axis=1)

  model_key, reference_key = jax.random.split(key)
  fixed = jax.lax.stop_gradient(merged(r.train, reference))
  ratio = log_likelihood(params, model_key) - log_likelihood(fixed, reference_key)
  right_B, other_B = ratio.reshape(-1, 2).T
  alone_B = batch["drop"] | (label_B == wrong_B)
  loss_B = contrastive_loss(
    r.objective, right_B, other_B, alone_B, r.model.image_tokens
  )
  return loss_B, {"loss": loss_B, "margin": right_B - other_B}


def _updated(
  recipe: GPTRecipe, state: TrainState, metrics: Metrics, grads: Any
) -> tuple[TrainState, Metrics]:
  """Returns the state after the update and the metrics of the step."""
  new, update_norm, skipped = guarded_update(
    recipe.guard, state, grads, metrics["loss"], _optimizer(recipe),
    recipe.optimizer.ema,
  )  # fmt: skip
  metrics = (
    metrics
    | skipped
    | {
      "grad_norm": optax.global_norm(grads),
      "update_norm": update_norm,
      "lr": schedule(recipe)(state.step),
    }
  )
  return new, metrics


def _optimizer(recipe: GPTRecipe) -> optax.GradientTransformationExtraArgs:
  r = recipe
  optimizer = make_optimizer(r.optimizer, schedule(r), matrix_axes, decay_mask)
  if r.train.only != "all":  # moments of the trained weights alone
    optimizer = optax.partition(
      {True: optimizer, False: optax.set_to_zero()},
      functools.partial(trainable, r.train),
    )
  return guard(optimizer, r.guard)
