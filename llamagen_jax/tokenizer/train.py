"""`llamagen train-tokenizer`: trains a VQ tokenizer on pictures."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from llamagen_jax import bundle, pictures
from llamagen_jax.data.images import CenterPicture, TrainingPicture, open_source
from llamagen_jax.data.loader import Batch, Stream, epoch_batches
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.losses import LossConfig, reconstruction_loss
from llamagen_jax.tokenizer.model import VQModel, init_tokenizer
from llamagen_jax.training.loop import Evaluation, Metrics, Task, fit
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig, build, parse_command
from llamagen_jax.training.state import TrainState

EXAMPLES = 12  # pictures in the evaluation's grid


@dataclasses.dataclass(frozen=True)
class PictureData:
  """Where training pictures come from and how they are cut."""

  source: str
  eval_source: str
  image_size: int
  batch_size: int  # over all hosts
  largest_resize: float = 1.25  # shorter side up to this times image_size
  mirror: bool = True
  min_side: int = 16  # smaller pictures are bad ones
  max_bad_share: float = 0.01  # of the source, before the run fails
  workers: int = 0  # processes that decode; 0 = threads


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
  """The whole config of a tokenizer's training."""

  model: TokenizerConfig
  loss: LossConfig
  data: PictureData
  optimizer: OptimizerConfig
  mesh: MeshConfig
  run: RunConfig


def main(argv: Sequence[str]) -> None:
  command = parse_command("train-tokenizer", argv)
  train(command.config, command.workdir)


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> TrainState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(TokenizerRecipe, config)
  return fit(
    make_task(recipe, workdir), recipe.run, recipe.mesh, workdir, config.to_dict()
  )


def make_task(recipe: TokenizerRecipe, workdir: pathlib.Path) -> Task:
  r = recipe
  source, eval_source = open_source(r.data.source), open_source(r.data.eval_source)
  d = r.data
  transform = TrainingPicture(
    source, d.image_size, d.largest_resize, d.mirror, d.min_side
  )
  return Task(
    init=functools.partial(init_state, r),
    step=functools.partial(train_step, r),
    stream=Stream(
      source, transform, d.batch_size, r.run.seed, d.workers, d.max_bad_share
    ),
    evaluate=functools.partial(evaluate, r, eval_source, workdir),
    export=lambda state, path: bundle.save_tokenizer(path, r.model, state.weights),
    curves=("loss", "reconstruction", "eval/psnr"),
  )


def init_state(recipe: TokenizerRecipe, key: jax.Array) -> TrainState:
  params = init_tokenizer(recipe.model, key)
  return TrainState.create(params, _optimizer(recipe), recipe.optimizer.ema > 0)


def train_step(
  recipe: TokenizerRecipe, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """One update of the generator on a batch of uint8 pictures."""
  images = pictures.from_uint8(batch["image"])
  key = jax.random.fold_in(jax.random.key(recipe.run.seed), state.step)
  model = VQModel(recipe.model, training=True)

  def loss_fn(params):
    reconstructions, quantized = model.apply(
      {"params": params}, images, rngs={"dropout": key}
    )
    terms = quantized.losses | {
      "reconstruction": reconstruction_loss(recipe.loss, images, reconstructions)
    }
    return sum(terms.values()), terms

  (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  optimizer = _optimizer(recipe)
  metrics = terms | {
    "loss": loss,
    "grad_norm": optax.global_norm(grads),
    "lr": learning_rate(recipe.optimizer, recipe.run.steps)(state.step),
  }
  return state.update(grads, optimizer, recipe.optimizer.ema), metrics


def evaluate(
  recipe: TokenizerRecipe,
  source: Any,
  workdir: pathlib.Path,
  state: TrainState,
  mesh: jax.sharding.Mesh,
) -> Evaluation:
  """PSNR and code usage over held-out pictures; originals above reconstructions."""
  d = recipe.data
  transform = CenterPicture(d.image_size, d.min_side)
  batches = epoch_batches(source, transform, d.batch_size, mesh, shuffle=True)
  found = reconstruct(recipe.model, state.weights, batches, EXAMPLES)
  rows = np.concatenate([found.originals, found.reconstructions])
  sheet = pictures.grid(rows, columns=len(found.originals))
  if jax.process_index() == 0:
    pictures.save_png(workdir / "reconstructions.png", sheet)
  return Evaluation(found.metrics, {"reconstructions": np.asarray(sheet)})


def _optimizer(recipe: TokenizerRecipe):
  return make_optimizer(recipe.optimizer, recipe.run.steps)
