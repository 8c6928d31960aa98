"""`llamagen train-gpt`: trains a transformer on code shards."""

import dataclasses
import functools
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from llamagen_jax.data.codes import CodeRecord, CodeSource
from llamagen_jax.data.loader import Batch, Stream, epoch_batches
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.gpt.model import GPT, init_gpt
from llamagen_jax.gpt.objective import (
  ObjectiveConfig,
  accumulated,
  cross_entropy,
  objective,
  sample_weights,
)
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.training.captions import Captions, FeatureStream, PairSource
from llamagen_jax.training.guard import GuardConfig, guard
from llamagen_jax.training.loop import Evaluation, Metrics, Task, fit
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig, build
from llamagen_jax.training.speed import Work
from llamagen_jax.training.state import TrainState
from llamagen_jax.weights import bundle


@dataclasses.dataclass(frozen=True)
class CodeData:
  """Which code shards to train on, and for captions which texts go with them."""

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
  log_update_norm: bool = False  # costs a pass over the weights
  init_from: str = ""  # run or bundle whose weights a fresh run starts with


def train(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, profile: int = 0
) -> TrainState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(GPTRecipe, config)
  task = make_task(recipe)
  return fit(task, recipe.run, recipe.mesh, workdir, config.to_dict(), profile)


def make_task(recipe: GPTRecipe) -> Task:
  r = recipe
  source, eval_source = CodeSource(r.data.codes), CodeSource(r.data.eval_codes)
  for codes in (source, eval_source):
    check_codes(codes, r.model)
  options = r.data.batch_size, r.run.seed, r.data.workers
  if r.model.condition == "class":
    captions, stream = None, Stream(source, pick_crop, *options)
  else:
    captions = Captions(r.model, r.data.t5, r.data.t5_dtype, r.data.short_share)
    source = captions.open(source, r.data.texts)
    eval_source = captions.open(eval_source, r.data.eval_texts)
    stream = FeatureStream(source, captions.input, *options, captions=captions)
  return Task(
    init=functools.partial(init_state, r),
    step=functools.partial(train_step, r),
    stream=stream,
    evaluate=functools.partial(evaluate, r, eval_source, captions),
    export=functools.partial(export, r, source, captions),
    curves=("loss", "eval/loss"),
    load=functools.partial(load_weights, r, source) if r.init_from else None,
    max_skipped_in_a_row=r.guard.max_skipped_in_a_row,
    work=Work(
      r.data.batch_size * r.model.length, train_flops(r.model, r.data.batch_size)
    ),
  )


def check_codes(source: CodeSource, config: GPTConfig) -> None:
  """Refuses codes that a model of this shape cannot be trained on."""
  found, name = source.manifest, f"code shards {source.folder}"
  if found["grid"] != config.grid:
    raise UserError(
      f"{name}: {found['grid']}x{found['grid']} codes an image, the model"
      f" expects {config.grid}x{config.grid}"
    )
  if found["codebook_size"] > config.vocab_size:
    raise UserError(
      f"{name}: codebook of {found['codebook_size']}, the model's vocabulary is"
      f" {config.vocab_size}"
    )
  if config.condition == "class":
    labels = [int(label) for label in found["label_counts"]]
    if min(labels) < 0 or max(labels) >= config.num_classes:
      bad = min(labels) if min(labels) < 0 else max(labels)
      raise UserError(
        f"{name}: label {bad} is out of range, the model expects labels"
        f" 0 .. {config.num_classes - 1}"
      )


def pick_crop(record: CodeRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Grain transform: one of the record's crops, all equally likely."""
  codes = record.codes[rng.integers(len(record.codes))]
  return {"codes": codes.astype(np.int32), "label": np.int32(record.label)}


def first_crop(record: CodeRecord) -> dict[str, np.ndarray]:
  return {"codes": record.codes[0].astype(np.int32), "label": np.int32(record.label)}


def decay_mask(params: Any) -> Any:
  """True on what weight decay acts on: two axes or more, and trained.

  Layers are stacked along an axis of their own, which does not count.
  """

  def decays(path, leaf):
    names = [getattr(p, "key", None) for p in path]
    return leaf.ndim - ("layers" in names) >= 2 and "unconditional" not in names

  return jax.tree_util.tree_map_with_path(decays, params)


def condition_of(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
  """The model's condition and its mask: labels, or features of captions."""
  if "label" in batch:
    return batch["label"], None
  return batch["features"], batch["mask"]


def init_state(recipe: GPTRecipe, key: jax.Array) -> TrainState:
  params = init_gpt(recipe.model, key)
  return TrainState.create(params, _optimizer(recipe), recipe.optimizer.ema > 0)


def train_step(
  recipe: GPTRecipe, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """One update on codes [B, T] and labels [B], or features [B, P, C] and mask [B, P].

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

  def loss_fn(params, part, key):
    condition, mask = condition_of(part)
    logits_BTV = GPT(c, training=True).apply(
      {"params": params},
      part["codes"],
      condition,
      mask,
      drop_B=part["drop"],
      rngs={"dropout": key},
    )
    loss_BT = cross_entropy(logits_BTV, part["codes"])
    minimised_BT = objective(recipe.objective, logits_BTV, loss_BT)
    means = (jnp.sum(jnp.mean(x, 1) * part["share"]) for x in (minimised_BT, loss_BT))
    return tuple(means)

  def loss_and_grads(part, number):
    key = jax.random.fold_in(dropout_key, number)
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    (_, loss), grads = grad(state.params, part, key)
    return loss, grads

  loss, grads = accumulated(loss_and_grads, batch, recipe.objective.accumulate)
  metrics = {
    "loss": loss,
    "grad_norm": optax.global_norm(grads),
    "lr": learning_rate(recipe.optimizer, recipe.run.steps)(state.step),
  }
  new = state.update(grads, _optimizer(recipe), recipe.optimizer.ema, loss=loss)
  if recipe.log_update_norm:
    metrics["update_norm"] = optax.global_norm(
      jax.tree.map(jnp.subtract, new.params, state.params)
    )
  if recipe.guard.on:
    skipped = new.opt_state.in_a_row > 0
    ema = jax.tree.map(lambda o, n: jnp.where(skipped, o, n), state.ema, new.ema)
    new = new.replace(ema=ema)
    metrics["skipped"] = new.opt_state.skipped
    metrics["skipped_in_a_row"] = new.opt_state.in_a_row
  return new, metrics


def evaluate(
  recipe: GPTRecipe,
  source: CodeSource | PairSource,
  captions: Captions | None,
  state: TrainState,
  mesh: jax.sharding.Mesh,
) -> Evaluation:
  """Mean loss per code over held-out images, first crop, no dropout."""
  total = weight = 0.0
  transform = first_crop if captions is None else captions.input.first
  for batch in epoch_batches(source, transform, recipe.data.batch_size, mesh):
    if captions is not None:
      batch = captions.features(batch, mesh)
    found = _eval_step(recipe.model, state.weights, batch)
    total += float(found[0])
    weight += float(found[1])
  return Evaluation({"loss": total / weight})


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(config: GPTConfig, params: Any, batch: Batch):
  condition, mask = condition_of(batch)
  logits = GPT(config).apply({"params": params}, batch["codes"], condition, mask)
  loss_B = jnp.mean(cross_entropy(logits, batch["codes"]), axis=1)
  weight_B = batch["weight"] * batch.get("valid", 1.0)
  return jnp.sum(loss_B * weight_B), jnp.sum(weight_B)


def load_weights(
  recipe: GPTRecipe, source: CodeSource | PairSource, state: TrainState
) -> TrainState:
  """Puts a bundle's weights into a fresh state, for another image size, say.

  Positions have no weights, so only the shapes have to agree, and the codes and
  features have to be of the same tokenizer and text encoder.
  """
  path = epath.Path(recipe.init_from)
  if (path / "bundle" / bundle.CONFIG).exists():  # a run
    path = path / "bundle"
  shapes = jax.tree.map(jnp.shape, state.params)
  mesh = state.step.sharding.mesh
  found = bundle.load_gpt(path, mesh)
  if jax.tree.map(jnp.shape, found.params) != shapes:
    raise UserError(
      f"init_from={path}: a model of other shapes; {found.config} there,"
      f" {recipe.model} here"
    )
  codes = source if isinstance(source, CodeSource) else source.codes
  if found.tokenizer != codes.manifest["tokenizer"]:
    raise UserError(
      f"init_from={path} knows the codes of tokenizer {found.tokenizer[:12]},"
      f" {codes.folder} has those of {codes.manifest['tokenizer'][:12]}"
    )
  ema = None if state.ema is None else jax.tree.map(jnp.copy, found.params)
  return state.replace(params=found.params, ema=ema)


def export(
  recipe: GPTRecipe,
  source: CodeSource | PairSource,
  captions: Captions | None,
  state: TrainState,
  path: pathlib.Path,
) -> None:
  """Writes the bundle; it names the tokenizer whose codes were learned."""
  codes, text_encoder = source, ""
  if captions is not None:
    codes = source.codes
    text_encoder = captions.encoder_identity(source, state.step.sharding.mesh)
  transformer = bundle.Transformer(
    recipe.model,
    state.weights,
    recipe.sampling,
    codes.manifest["tokenizer"],
    tuple(codes.manifest["class_names"]),
    text_encoder,
  )
  bundle.save_gpt(path, transformer)


def _optimizer(recipe: GPTRecipe):
  optimizer = make_optimizer(recipe.optimizer, recipe.run.steps, decay_mask)
  return guard(optimizer, recipe.guard) if recipe.guard.on else optimizer
