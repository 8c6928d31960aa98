"""The tokenizer's training task: its data, its evaluation, its weights from files."""

import functools
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from llamagen_jax.data.images import CenterImage, TrainingImage
from llamagen_jax.data.loader import Stream, epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.images import grid
from llamagen_jax.parallel.mesh import shard_tree
from llamagen_jax.tokenizer.losses import LossConfig
from llamagen_jax.training.export import describe_tokenizer
from llamagen_jax.training.loop import Phase, Task, fit
from llamagen_jax.training.recipe import build
from llamagen_jax.training.reporter import Evaluation
from llamagen_jax.training.state import shardings_of
from llamagen_jax.training.tokenizer_state import TokenizerState, load_weights
from llamagen_jax.training.tokenizer_step import (
  TokenizerRecipe,
  gan_phases,
  init_state,
  schedules,
  train_step,
)
from llamagen_jax.weights.lpips import load_lpips
from llamagen_jax.weights.resnet import load_resnet

EXAMPLES = 12  # images in the evaluation's grid


def train(
  config: ml_collections.ConfigDict, workdir: os.PathLike, profile: int = 0
) -> TokenizerState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(TokenizerRecipe, config)
  task = make_task(recipe)
  return fit(task, recipe.run, recipe.mesh, workdir, config.to_dict(), profile)


def make_task(recipe: TokenizerRecipe) -> Task:
  """Returns the task of a config; opens its data and LPIPS's weights."""
  r, d = recipe, recipe.data
  if r.loss.adversarial_weight:
    r.discriminator.check_side(d.image_size)
  frozen = load_perceptual(r.loss)
  source, eval_source = open_source(d.source), open_source(d.eval_source)
  transform = TrainingImage(
    source, d.image_size, d.max_resize, d.random_flip, d.decoder
  )
  return Task(
    init=functools.partial(init_state, r),
    phases=(
      {
        start: Phase(functools.partial(train_step, r, phase))
        for start, phase in gan_phases(r.loss).items()
      },
    ),
    load=functools.partial(load_state, r, frozen),
    stream=Stream(
      source, transform, d.batch_size, r.run.seed, d.workers, d.max_bad_share
    ),
    evaluate=functools.partial(evaluate, r, eval_source),
    describe=lambda mesh: describe_tokenizer(),
    recipe=functools.partial(build, TokenizerRecipe),
    schedules=_schedules_by_step,
    curves=("loss", "reconstruction", "discriminator_loss", "usage", "eval/psnr"),
    max_skipped_in_a_row=r.guard.max_skipped_in_a_row,
  )


def _schedules_by_step(recipe: TokenizerRecipe):
  """Returns the learning rates as functions of the run's step."""
  begin = recipe.loss.disc_start - recipe.loss.disc_warmup_steps
  rates = schedules(recipe)
  discriminator = rates["discriminator_optimizer"]
  return rates | {
    "discriminator_optimizer": lambda step: discriminator(max(0, step - begin))
  }


def load_perceptual(loss: LossConfig) -> dict[str, Any]:
  """Returns the frozen network of the perceptual term, by its name in the state."""
  if not loss.perceptual_weight:
    return {}
  if loss.perceptual == "lpips":
    return {"lpips": load_lpips(loss.lpips)}
  return {"resnet": load_resnet(loss.resnet)}


def load_state(
  recipe: TokenizerRecipe, frozen: dict[str, Any], state: TokenizerState
) -> TokenizerState:
  """Returns a fresh state with the weights that come from files."""
  for name, params in frozen.items():
    shards = shardings_of(getattr(state, name))
    state = state.replace(**{name: shard_tree(params, shards)})
  return load_weights(recipe.init, state) if recipe.init.source else state


def evaluate(
  recipe: TokenizerRecipe, source: Any, state: TokenizerState, mesh: jax.sharding.Mesh
) -> Evaluation:
  """Returns distances, code usage and a grid: originals above reconstructions."""
  d = recipe.data
  transform = CenterImage(d.image_size, d.decoder)
  batches = epoch_batches(source, transform, d.batch_size, mesh, shuffle=True)
  scores = reconstruct(recipe.model, state.weights, batches, EXAMPLES, state.lpips)
  pairs = np.concatenate([scores.originals, scores.reconstructions])
  sheet = grid(pairs, columns=len(scores.originals))
  return Evaluation(scores.metrics, {"reconstructions": np.asarray(sheet)})
