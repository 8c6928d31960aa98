"""`llamagen train-gpt`: trains a transformer on code shards."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from llamagen_jax import bundle
from llamagen_jax.data.codes import CodeRecord, CodeSource
from llamagen_jax.data.loader import Batch, Stream, epoch_batches
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import GPT, init_gpt
from llamagen_jax.sampling.config import SamplingConfig
from llamagen_jax.training.loop import Evaluation, Metrics, Task, fit
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig, build, parse_command
from llamagen_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class CodeData:
  """Which code shards to train on."""

  codes: str  # folder of shards
  eval_codes: str  # folder of held-out shards
  batch_size: int  # over all hosts
  workers: int = 0  # processes that read; 0 = threads


@dataclasses.dataclass(frozen=True)
class GPTRecipe:
  """The whole config of a transformer's training."""

  model: GPTConfig
  data: CodeData
  optimizer: OptimizerConfig
  sampling: SamplingConfig  # stored in the bundle as its defaults
  mesh: MeshConfig
  run: RunConfig


def main(argv: Sequence[str]) -> None:
  command = parse_command("train-gpt", argv)
  train(command.config, command.workdir)


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> TrainState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(GPTRecipe, config)
  return fit(make_task(recipe), recipe.run, recipe.mesh, workdir, config.to_dict())


def make_task(recipe: GPTRecipe) -> Task:
  r = recipe
  source, eval_source = CodeSource(r.data.codes), CodeSource(r.data.eval_codes)
  for codes in (source, eval_source):
    codes.check_model(r.model)
  return Task(
    init=functools.partial(init_state, r),
    step=functools.partial(train_step, r),
    stream=Stream(source, pick_crop, r.data.batch_size, r.run.seed, r.data.workers),
    evaluate=functools.partial(evaluate, r, eval_source),
    export=functools.partial(export, r, source),
    curves=("loss", "eval/loss"),
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


def cross_entropy(logits_BTV: jax.Array, codes_BT: jax.Array) -> jax.Array:
  """-log p of every code, float32 [B, T]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, codes_BT)


def init_state(recipe: GPTRecipe, key: jax.Array) -> TrainState:
  params = init_gpt(recipe.model, key)
  return TrainState.create(params, _optimizer(recipe), recipe.optimizer.ema > 0)


def train_step(
  recipe: GPTRecipe, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """One update on codes [B, T] and labels [B]; the loss is the mean over codes."""
  c = recipe.model
  step_key = jax.random.fold_in(jax.random.key(recipe.run.seed), state.step)
  drop_key, dropout_key = jax.random.split(step_key)
  drop_B = jax.random.bernoulli(drop_key, c.condition_dropout, batch["label"].shape)

  def loss_fn(params):
    logits_BTV = GPT(c, training=True).apply(
      {"params": params},
      batch["codes"],
      batch["label"],
      drop_B=drop_B,
      rngs={"dropout": dropout_key},
    )
    return jnp.mean(cross_entropy(logits_BTV, batch["codes"]))

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  metrics = {
    "loss": loss,
    "grad_norm": optax.global_norm(grads),
    "lr": learning_rate(recipe.optimizer, recipe.run.steps)(state.step),
  }
  return state.update(grads, _optimizer(recipe), recipe.optimizer.ema), metrics


def evaluate(
  recipe: GPTRecipe, source: CodeSource, state: TrainState, mesh: jax.sharding.Mesh
) -> Evaluation:
  """Mean loss per code over held-out pictures, first crop, no dropout."""
  total = weight = 0.0
  for batch in epoch_batches(source, first_crop, recipe.data.batch_size, mesh):
    found = _eval_step(recipe.model, state.weights, batch)
    total += float(found[0])
    weight += float(found[1])
  return Evaluation({"loss": total / weight})


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(config: GPTConfig, params: Any, batch: Batch):
  logits = GPT(config).apply({"params": params}, batch["codes"], batch["label"])
  loss_B = jnp.mean(cross_entropy(logits, batch["codes"]), axis=1)
  return jnp.sum(loss_B * batch["weight"]), jnp.sum(batch["weight"])


def export(
  recipe: GPTRecipe, source: CodeSource, state: TrainState, path: pathlib.Path
) -> None:
  """Writes the bundle; it names the tokenizer whose codes were learned."""
  manifest = source.manifest
  transformer = bundle.Transformer(
    recipe.model,
    state.weights,
    recipe.sampling,
    manifest["tokenizer"],
    tuple(manifest["class_names"]),
  )
  bundle.save_gpt(path, transformer)


def _optimizer(recipe: GPTRecipe):
  return make_optimizer(recipe.optimizer, recipe.run.steps, decay_mask)
