"""The transformer's training task: code shards, evaluation, weights from elsewhere."""

import dataclasses
import functools
import os
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from llamagen_jax.data.classes import Relabelled, match_classes
from llamagen_jax.data.codes import CodeRecord, CodeSource
from llamagen_jax.data.loader import Batch, Stream, epoch_batches
from llamagen_jax.data.size_buckets import SizeBuckets
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import GPT
from llamagen_jax.gpt.objective import cross_entropy
from llamagen_jax.sides import Sides, show_grid
from llamagen_jax.storage import user_path
from llamagen_jax.training.captions import Captions, FeatureStream, PairSource
from llamagen_jax.training.export import describe_gpt
from llamagen_jax.training.finetune import adapted, merge_once, table_rows
from llamagen_jax.training.gpt_step import (
  GPTRecipe,
  condition_of,
  init_state,
  schedule,
  train_step,
  work,
)
from llamagen_jax.training.loop import Phase, Task, fit
from llamagen_jax.training.recipe import build
from llamagen_jax.training.reporter import Evaluation
from llamagen_jax.training.sample_grid import SampleGrid
from llamagen_jax.training.sample_scores import SampleScores
from llamagen_jax.training.state import TrainState
from llamagen_jax.weights import bundle


def train(
  config: ml_collections.ConfigDict, workdir: os.PathLike, profile: int = 0
) -> TrainState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(GPTRecipe, config)
  task = make_task(recipe)
  return fit(task, recipe.run, recipe.mesh, workdir, config.to_dict(), profile)


def make_task(recipe: GPTRecipe) -> Task:
  """Returns the task of a config; opens its code shards and captions."""
  model = recipe.model.for_backend(jax.default_backend())
  r = dataclasses.replace(recipe, model=model)
  codes = open_codes("data.codes", r.data.codes, r.model)
  eval_codes = open_codes("data.eval_codes", r.data.eval_codes, r.model)
  options = r.data.batch_size, r.run.seed, r.data.workers
  if r.model.condition == "class":
    captions, sources = None, codes
    streams = [Stream(source, pick_crop, *options) for source in sources]
    eval_sources = [with_labels_of(codes[0], source) for source in eval_codes]
  else:
    captions = Captions(r.model, r.data.t5, r.data.t5_dtype, r.data.short_share)
    sources = captions.open(codes, r.data.texts)
    eval_sources = captions.open(eval_codes, r.data.eval_texts)
    streams = [
      FeatureStream(source, captions.input, *options, captions=captions)
      for source in sources
    ]
  held_out = {
    x.grid: source for x, source in zip(eval_codes, eval_sources, strict=True)
  }
  return Task(
    init=functools.partial(init_state, r),
    phases=tuple(_phases(r, source.grid) for source in codes),
    stream=streams[0] if len(streams) == 1 else SizeBuckets(streams),
    evaluate=GPTEvaluation(
      r,
      held_out,
      captions,
      sources[0],
      SampleGrid(
        r.images, codes[0].manifest["tokenizer"], r.model.condition, r.data.t5
      ),
      SampleScores(r.images, r.model),
    ),
    describe=functools.partial(describe, sources[0], captions),
    recipe=functools.partial(build, GPTRecipe),
    schedules=lambda recipe: {"optimizer": schedule(recipe)},
    curves=("loss", "eval/loss"),
    load=functools.partial(load_weights, r, sources[0], captions)
    if r.init_from
    else None,
    max_skipped_in_a_row=r.guard.max_skipped_in_a_row,
  )


def _phases(recipe: GPTRecipe, grid: Sides) -> dict[int, Phase]:
  """Returns the phases of a run for images of one of the model's grids."""
  r = dataclasses.replace(recipe, model=recipe.model.at(grid))
  return {
    start: Phase(functools.partial(train_step, r, phase=phase), work(r, phase.patch))
    for start, phase in r.objective.phases().items()
  }


def open_codes(field: str, folders: str, config: GPTConfig) -> list[CodeSource]:
  """Opens the code shards of a config's field, a folder for each grid of the model.

  Raises:
    UserError: they do not fit the model, or each other.
  """
  sources = [CodeSource(folder.strip()) for folder in folders.split(",")]
  first = sources[0].manifest
  for source in sources:
    check_codes(source, config)
    for name in ("tokenizer", "class_names"):
      if source.manifest[name] != first[name]:
        raise UserError(
          f"{field}: {source.folder} has another {name} than {sources[0].folder}"
        )
  grids = [source.grid for source in sources]
  if len(set(grids)) < len(grids) or len(grids) < len(config.grids):
    raise UserError(
      f"{field}={folders}: grids {', '.join(map(str, grids))}; expected a folder for"
      f" each of the model's, {', '.join(map(str, config.grids))}"
    )
  return sources


def with_labels_of(
  source: CodeSource, eval_source: CodeSource
) -> CodeSource | Relabelled:
  """Gives held-out codes the training codes' labels, where a class has another."""
  names, eval_names = (s.manifest["class_names"] for s in (source, eval_source))
  owners = f"data.codes={source.folder}", f"data.eval_codes={eval_source.folder}"
  labels = match_classes(names, eval_names, *owners)
  return eval_source if labels is None else Relabelled(eval_source, labels)


def check_codes(source: CodeSource, config: GPTConfig) -> None:
  """Refuses codes that a model of this shape cannot be trained on.

  Raises:
    UserError: with all that does not fit, and the flags that mend it.
  """
  manifest, found = source.manifest, []
  grid, rows = source.grid, manifest["codebook_size"]
  if grid not in config.grids:
    flag = grid if isinstance(grid, int) else "{},{}".format(*grid)
    found.append(
      f"{show_grid(grid)} codes an image, the model expects"
      f" {' or '.join(map(show_grid, config.grids))}: --config.model.grid={flag}"
    )
  if rows > config.vocab_size:
    found.append(
      f"codebook of {rows}, the model's vocabulary is {config.vocab_size}:"
      f" --config.model.vocab_size={rows}"
    )
  labels = [int(label) for label in manifest["label_counts"]] or [0]
  if config.condition == "class" and min(labels) < 0:
    found.append(
      f"label {min(labels)} is out of range: images without a class cannot train a"
      " model of classes; put the images into a folder for each class"
    )
  elif config.condition == "class" and max(labels) >= config.num_classes:
    found.append(
      f"label {max(labels)} is out of range, the model expects labels"
      f" 0 .. {config.num_classes - 1}: --config.model.num_classes={max(labels) + 1}"
    )
  if found:
    raise UserError(f"code shards {source.folder}: {'; '.join(found)}")


def pick_crop(record: CodeRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Grain transform: returns one of the record's crops, all equally likely."""
  codes = record.codes[rng.integers(len(record.codes))]
  return {"codes": codes.astype(np.int32), "label": np.int32(record.label)}


def first_crop(record: CodeRecord) -> dict[str, np.ndarray]:
  """Transform of an evaluation: returns the centre crop."""
  return {"codes": record.codes[0].astype(np.int32), "label": np.int32(record.label)}


@dataclasses.dataclass
class GPTEvaluation:
  """Evaluates on held-out images, scores samples, and samples a grid of images."""

  recipe: GPTRecipe
  sources: dict[Sides, CodeSource | Relabelled | PairSource]  # held-out, by their grid
  captions: Captions | None
  train_source: CodeSource | PairSource
  grid: SampleGrid
  scores: SampleScores

  def __call__(self, state: TrainState, mesh: jax.sharding.Mesh) -> Evaluation:
    """Returns the mean loss per code, first crop, no dropout, scores and the grid."""
    r, captions = self.recipe, self.captions
    weights = merge_once(r.train, state.weights)
    transform = first_crop if captions is None else captions.input.first
    sums = []
    for grid, source in self.sources.items():
      for batch in epoch_batches(source, transform, r.data.batch_size, mesh):
        if captions is not None:
          batch = captions.features(batch, mesh)
        sums.append(_eval_step(r.model.at(grid), weights, batch))
    # Read at the end: a float a batch would let the devices wait for the host.
    total, weight = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    metrics = {"loss": float(total / weight)}
    if not r.images.tokenizer:
      return Evaluation(metrics)
    gpt = self._transformer(weights, mesh)
    encoder = captions.encoder(mesh) if r.data.t5 else None
    metrics |= self.scores(gpt, self.grid.tokenizer(mesh), mesh)
    return Evaluation(metrics, self.grid(gpt, mesh, encoder))

  def _transformer(self, weights: Any, mesh: jax.sharding.Mesh) -> bundle.Transformer:
    """Returns the transformer of the averaged weights, as its bundle will be."""
    about = describe(self.train_source, self.captions, mesh)
    return bundle.Transformer(
      self.recipe.model, weights, self.recipe.sampling, about["tokenizer"],
      tuple(about["class_names"]), about["text_encoder"],
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(config: GPTConfig, params: Any, batch: Batch):
  condition, mask = condition_of(batch)
  # A guidance-free model without guidance, as the others are evaluated.
  beta_B = jnp.ones(batch["codes"].shape[0]) if config.guidance_embedding else None
  logits = GPT(config).apply(
    {"params": params}, batch["codes"], condition, mask, guidance_beta=beta_B
  )
  loss_B = jnp.mean(cross_entropy(logits, batch["codes"]), axis=1)
  weight_B = batch["weight"] * batch.get("valid", 1.0)
  return jnp.sum(loss_B * weight_B), jnp.sum(weight_B)


def load_weights(
  recipe: GPTRecipe,
  source: CodeSource | PairSource,
  captions: Captions | None,
  state: TrainState,
) -> TrainState:
  """Returns the fresh state with a bundle's weights, also of another image size.

  Positions have no weights, so only the shapes have to agree, and the codes and
  features have to be of the same tokenizer and text encoder.

  Raises:
    UserError: they do not agree.
  """
  path = user_path(recipe.init_from)
  if (path / "checkpoints").exists() and not (path / "bundle").exists():
    raise UserError(
      f"init_from={path}: a run without a bundle; write one with llamagen"
      f" export-bundle --workdir={path}"
    )
  if (path / "bundle" / bundle.CONFIG).exists():  # a run
    path = path / "bundle"
  loaded = bundle.load_gpt(path, state.step.sharding.mesh)
  codes = source if isinstance(source, CodeSource) else source.codes
  if loaded.tokenizer != codes.manifest["tokenizer"]:
    raise UserError(
      f"init_from={path} knows the codes of tokenizer {loaded.tokenizer[:12]},"
      f" {codes.folder} has those of {codes.manifest['tokenizer'][:12]}"
    )
  encoder = (
    ""
    if captions is None
    else captions.encoder_identity(source, state.step.sharding.mesh)
  )
  if loaded.text_encoder and encoder and loaded.text_encoder != encoder:
    field = "data.t5" if recipe.data.t5 else "data.texts"
    raise UserError(
      f"init_from={path} knows the features of text encoder {loaded.text_encoder[:12]},"
      f" {field} has those of {encoder[:12]}"
    )
  names = codes.manifest["class_names"]
  rows = table_rows(loaded.class_names, names)
  if 0 < len(names) < recipe.model.num_classes and max(rows) < 0:
    logging.warning(
      "data.codes has %d classes, the model %d: a class starts from the row of its"
      " number; --config.model.num_classes=%d takes that of its name",
      len(names), recipe.model.num_classes, len(names),
    )  # fmt: skip
  params = adapted(f"init_from={path}", loaded.params, state.params, rows)
  logging.info("starts from the weights of %s", path)
  copied = functools.partial(jax.tree.map, jnp.copy)
  return state.replace(
    params=params,
    ema=None if state.ema is None else copied(params),
    reference=None if state.reference is None else copied(params),
  )


def describe(
  source: CodeSource | PairSource, captions: Captions | None, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns what the bundle says of tokenizer, classes and text encoder."""
  codes = source if captions is None else source.codes
  text_encoder = "" if captions is None else captions.encoder_identity(source, mesh)
  names = tuple(codes.manifest["class_names"])
  return describe_gpt(codes.manifest["tokenizer"], names, text_encoder)
