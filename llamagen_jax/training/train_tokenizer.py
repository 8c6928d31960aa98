"""`llamagen train-tokenizer`: trains a VQ tokenizer and its discriminator.

A step updates the generator (the tokenizer), then the discriminator on the same
reconstructions, as VQGAN does (arXiv 2012.09841, section 3.1; LlamaGen, section 2.1).
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from llamagen_jax.data.images import CenterImage, ImageDecoder, TrainingImage
from llamagen_jax.data.loader import Batch, Stream, epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.images import from_uint8, grid, save_png
from llamagen_jax.parallel.mesh import constrain, shard_tree
from llamagen_jax.tokenizer import codebook
from llamagen_jax.tokenizer.codebook import CodebookConfig
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.discriminator import (
  DiscriminatorConfig,
  discriminate,
  init_discriminator,
)
from llamagen_jax.tokenizer.losses import (
  LossConfig,
  adaptive_weight,
  discriminator_loss,
  generator_loss,
  reconstruction_loss,
)
from llamagen_jax.tokenizer.model import VQModel, init_tokenizer
from llamagen_jax.tokenizer.quantizer import l2_normalize
from llamagen_jax.training.loop import Evaluation, Metrics, Task, fit
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig, build
from llamagen_jax.training.state import TrainState
from llamagen_jax.training.tokenizer_state import (
  InitConfig,
  TokenizerState,
  load_weights,
)
from llamagen_jax.vision.lpips import lpips, shapes
from llamagen_jax.weights import bundle
from llamagen_jax.weights.lpips import load_lpips

EXAMPLES = 12  # images in the evaluation's grid


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
  """Where training images come from and how they are cut."""

  source: str
  eval_source: str
  image_size: int
  batch_size: int  # over all hosts
  accumulate: int = 1  # parts of a batch that are computed one after the other
  max_resize: float = 1.25  # shorter side up to this times image_size
  random_flip: bool = True
  min_side: int = 16  # smaller images are bad ones
  background: str = "white"  # colour behind transparent pixels
  ignore_exif: bool = False  # leave turned photographs as stored, as published runs did
  max_bad_share: float = 0.01  # of the source, before the run fails
  workers: int = 0  # processes that decode; 0 = threads

  def __post_init__(self):
    if self.accumulate < 1 or self.batch_size % self.accumulate:
      raise UserError(
        f"data.accumulate={self.accumulate} does not divide"
        f" data.batch_size={self.batch_size}"
      )

  @property
  def decoder(self) -> ImageDecoder:
    return ImageDecoder(self.min_side, self.background, self.ignore_exif)


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
  """The whole config of a tokenizer's training."""

  model: TokenizerConfig
  loss: LossConfig
  data: ImageDataConfig
  optimizer: OptimizerConfig  # of the generator
  mesh: MeshConfig
  run: RunConfig
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
  codebook: CodebookConfig = CodebookConfig()
  init: InitConfig = InitConfig()


@dataclasses.dataclass(frozen=True)
class GanPhase:
  """What of the adversarial game a step computes; a compiled program of its own."""

  discriminator: bool = False  # it is trained
  adversarial: bool = False  # the generator feels it


def train(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, profile: int = 0
) -> TokenizerState:
  """Trains as the config says, resuming what `workdir` holds; see `fit`."""
  recipe = build(TokenizerRecipe, config)
  task = make_task(recipe, workdir)
  return fit(task, recipe.run, recipe.mesh, workdir, config.to_dict(), profile)


def make_task(recipe: TokenizerRecipe, workdir: pathlib.Path) -> Task:
  r, d = recipe, recipe.data
  if r.loss.adversarial_weight:
    r.discriminator.check_side(d.image_size)
  lpips_params = load_lpips(r.loss.lpips) if r.loss.perceptual_weight else None
  source, eval_source = open_source(d.source), open_source(d.eval_source)
  transform = TrainingImage(
    source, d.image_size, d.max_resize, d.random_flip, d.decoder
  )
  steps = {
    start: functools.partial(train_step, r, stage)
    for start, stage in stages(r.loss).items()
  }
  return Task(
    init=functools.partial(init_state, r),
    step=steps.pop(0),
    later=steps,
    load=functools.partial(load_state, r, lpips_params),
    stream=Stream(
      source, transform, d.batch_size, r.run.seed, d.workers, d.max_bad_share
    ),
    evaluate=functools.partial(evaluate, r, eval_source, workdir),
    export=lambda state, path: bundle.save_tokenizer(path, r.model, state.weights),
    curves=("loss", "reconstruction", "discriminator_loss", "usage", "eval/psnr"),
  )


def stages(loss: LossConfig) -> dict[int, GanPhase]:
  """First step -> what is computed from there on."""
  if not loss.adversarial_weight:
    return {0: GanPhase()}
  begin = loss.disc_start - loss.disc_warmup_steps
  return {0: GanPhase(), begin: GanPhase(True), loss.disc_start: GanPhase(True, True)}


def init_state(recipe: TokenizerRecipe, key: jax.Array) -> TokenizerState:
  r = recipe
  generator = TrainState.create(
    init_tokenizer(r.model, key), _optimizer(r), r.optimizer.ema > 0
  )
  discriminator = lpips_params = None
  if r.loss.adversarial_weight:
    params = init_discriminator(r.discriminator, r.data.image_size, key)
    discriminator = TrainState.create(params, _disc_optimizer(r), ema=False)
  if r.loss.perceptual_weight:
    lpips_params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes())
  return TokenizerState(generator, discriminator, lpips_params, codebook.empty_window())


def load_state(
  recipe: TokenizerRecipe, lpips_params: Any, state: TokenizerState
) -> TokenizerState:
  """Fills what a fresh state takes from files."""
  if lpips_params is not None:
    lpips_sharding = jax.tree.map(lambda p: p.sharding, state.lpips)
    state = state.replace(lpips=shard_tree(lpips_params, lpips_sharding))
  return load_weights(recipe.init, state) if recipe.init.source else state


def train_step(
  recipe: TokenizerRecipe, stage: GanPhase, state: TokenizerState, batch: Batch
) -> tuple[TokenizerState, Metrics]:
  """One update of both networks on a batch of uint8 images.

  The generator comes first; the discriminator sees the reconstructions from before
  that update, and both gradients are of the discriminator from before its own.
  """
  r = recipe
  key = jax.random.fold_in(jax.random.key(r.run.seed), state.step)
  dropout_key, codebook_key = jax.random.split(key)
  images = from_uint8(batch["image"])
  state = _start_codebook(r, state, images, codebook_key)

  found, (codes, latents) = _accumulated(
    functools.partial(gradients, r, stage, state), images, dropout_key,
    r.data.accumulate,
  )  # fmt: skip
  generator_grads, discriminator_grads, metrics = found
  metrics["grad_norm"] = optax.global_norm(generator_grads)
  metrics["lr"] = learning_rate(r.optimizer, r.run.steps)(state.step)
  generator = state.generator.update(generator_grads, _optimizer(r), r.optimizer.ema)
  discriminator = state.discriminator
  if stage.discriminator:
    metrics["discriminator_grad_norm"] = optax.global_norm(discriminator_grads)
    discriminator = discriminator.update(discriminator_grads, _disc_optimizer(r), 0.0)

  window = codebook.push(state.window, codes)
  counts_K = codebook.counts(window, r.model.codebook_size)
  metrics |= codebook.usage(counts_K)
  if r.codebook.restart_every:
    generator = _revive(r, generator, latents, counts_K, codebook_key)
  return TokenizerState(generator, discriminator, state.lpips, window), metrics


def gradients(
  recipe: TokenizerRecipe,
  stage: GanPhase,
  state: TokenizerState,
  images: jax.Array,
  key: jax.Array,
) -> tuple[tuple[Any, Any, Metrics], tuple[jax.Array, jax.Array]]:
  """Gradients of both losses on images [B, H, W, 3] in [-1, 1].

  The generator's backward pass runs once, from the summed gradient at the image;
  the adaptive weight needs no more than one convolution's kernel gradient twice.

  Returns:
    what is a mean over the batch: (generator's, discriminator's gradients, loss
    terms), and what belongs to its images: (codes, the latents they are of).
  """
  r = recipe
  model = VQModel(r.model, training=True)

  def forward(params):
    reconstructions, quantized = model.apply(
      {"params": params}, images, rngs={"dropout": key}
    )
    return (reconstructions, sum(quantized.losses.values())), quantized

  def likelihood(reconstructions):
    terms = {"reconstruction": reconstruction_loss(r.loss, images, reconstructions)}
    if r.loss.perceptual_weight:
      distance_B = lpips(state.lpips, images, reconstructions, r.model.dtype)
      terms["perceptual"] = r.loss.perceptual_weight * jnp.mean(distance_B)
    return sum(terms.values()), terms

  (reconstructions, quantizer_loss), pull_back, quantized = jax.vjp(
    forward, state.params, has_aux=True
  )
  (loss, metrics), image_grad = jax.value_and_grad(likelihood, has_aux=True)(
    reconstructions
  )
  metrics |= quantized.losses
  loss += quantizer_loss

  if stage.adversarial:

    def adversarial(reconstructions):
      fake = discriminate(r.discriminator, state.discriminator.params, reconstructions)
      return generator_loss(r.loss.generator, fake)

    def last_kernel_grad(image_grad):
      (grads,) = pull_back((image_grad, jnp.zeros(())))
      return grads["decoder"]["conv_out"]["kernel"]

    value, adversarial_grad = jax.value_and_grad(adversarial)(reconstructions)
    weight = jnp.ones(())
    if r.loss.adaptive_weight:
      weight = adaptive_weight(
        last_kernel_grad(image_grad), last_kernel_grad(adversarial_grad)
      )
    metrics |= {"adversarial": value, "adaptive_weight": weight}
    weight *= r.loss.adversarial_weight
    loss += weight * value
    image_grad += weight * adversarial_grad
  (generator_grads,) = pull_back((image_grad, jnp.ones(())))
  metrics["loss"] = loss

  discriminator_grads = None
  if stage.discriminator:

    def judge(params):
      real, fake = (
        discriminate(r.discriminator, params, x) for x in (images, reconstructions)
      )
      found = {"logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}
      return discriminator_loss(r.loss.discriminator, real, fake), found

    (value, found), discriminator_grads = jax.value_and_grad(judge, has_aux=True)(
      state.discriminator.params
    )
    metrics |= found | {"discriminator_loss": value}
  latents_NC = quantized.inputs.reshape(-1, r.model.codebook_dim)
  return (generator_grads, discriminator_grads, metrics), (
    quantized.codes.ravel(), latents_NC,
  )  # fmt: skip


def _accumulated(compute: Callable, images: jax.Array, key: jax.Array, parts: int):
  """`compute` over parts of the batch: means of its first results, all of its second.

  A part takes every n-th image, so that no image changes its chip. Batch
  statistics and the adaptive weight are those of a part.
  """
  if parts == 1:
    return compute(images, key)
  split = images.reshape(-1, parts, *images.shape[1:]).swapaxes(0, 1)
  split = constrain(split, None, "batch", None, None, None)
  keys = jax.random.split(key, parts)
  means, rows = jax.eval_shape(compute, split[0], keys[0])

  def add(total, part):
    found, rows = compute(*part)
    return jax.tree.map(lambda t, f: t + f / parts, total, found), rows

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), means)
  means, rows = jax.lax.scan(add, zeros, (split, keys))
  return means, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _start_codebook(recipe, state: TokenizerState, images, key) -> TokenizerState:
  """At step 0 of a run from scratch, puts the codebook where the latents are."""
  r = recipe
  if r.codebook.init == "uniform" or r.init.source:
    return state

  def started(params):
    z = VQModel(r.model).apply({"params": params}, images, method="latents")
    z = z.reshape(-1, r.model.codebook_dim)
    if r.model.l2_norm:
      z = l2_normalize(z)
    size, sphere = r.model.codebook_size, r.model.l2_norm
    rows_KC = codebook.initial_rows(r.codebook, z, size, key, sphere)
    return params | {"codebook": rows_KC}

  generator = state.generator
  params = jax.lax.cond(state.step == 0, started, lambda p: p, generator.params)
  return state.replace(generator=generator.replace(params=params))


def _revive(recipe, generator: TrainState, latents_NC, counts_K, key) -> TrainState:
  """Every `restart_every` steps, rows that the window lacks become latents."""
  r = recipe

  def revived(generator):
    size = r.model.codebook_size
    rows_KC = codebook.drawn_rows(latents_NC, size, key)
    if r.model.l2_norm:
      rows_KC = l2_normalize(rows_KC)
    dead_K1 = (counts_K == 0)[:, None]
    return generator.replace(
      params=codebook.replace_codebook(generator.params, dead_K1, rows_KC),
      opt_state=codebook.replace_codebook(generator.opt_state, dead_K1, 0.0),
      ema=codebook.replace_codebook(generator.ema, dead_K1, rows_KC),
    )

  due = generator.step % r.codebook.restart_every == 0
  return jax.lax.cond(due, revived, lambda g: g, generator)


def evaluate(
  recipe: TokenizerRecipe,
  source: Any,
  workdir: pathlib.Path,
  state: TokenizerState,
  mesh: jax.sharding.Mesh,
) -> Evaluation:
  """Distances and code usage over held-out images; originals above the kept."""
  d = recipe.data
  transform = CenterImage(d.image_size, d.decoder)
  batches = epoch_batches(source, transform, d.batch_size, mesh, shuffle=True)
  found = reconstruct(recipe.model, state.weights, batches, EXAMPLES, state.lpips)
  rows = np.concatenate([found.originals, found.reconstructions])
  sheet = grid(rows, columns=len(found.originals))
  if jax.process_index() == 0:
    save_png(workdir / "reconstructions.png", sheet)
  return Evaluation(found.metrics, {"reconstructions": np.asarray(sheet)})


def _optimizer(recipe: TokenizerRecipe) -> optax.GradientTransformation:
  return make_optimizer(recipe.optimizer, recipe.run.steps)


def _disc_optimizer(recipe: TokenizerRecipe) -> optax.GradientTransformation:
  """A schedule of the discriminator counts its own updates."""
  r = recipe
  own_steps = r.run.steps - (r.loss.disc_start - r.loss.disc_warmup_steps)
  return make_optimizer(r.discriminator_optimizer, max(1, own_steps))
