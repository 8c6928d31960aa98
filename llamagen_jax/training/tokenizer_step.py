"""One update of the tokenizer and its discriminator.

A step updates the generator (the tokenizer), then the discriminator on the same
reconstructions, as VQGAN does (arXiv 2012.09841, section 3.1; LlamaGen, section 2.1).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers as MatrixAxes

from llamagen_jax.data.images import ImageDecoder
from llamagen_jax.data.loader import Batch
from llamagen_jax.errors import UserError
from llamagen_jax.images import from_uint8
from llamagen_jax.parallel.mesh import constrain
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
  averaged_logits,
  discriminator_loss,
  generator_loss,
  lecam_loss,
  reconstruction_loss,
)
from llamagen_jax.tokenizer.model import VQModel, init_tokenizer
from llamagen_jax.tokenizer.quantizer import Quantized
from llamagen_jax.training.guard import (
  GuardConfig,
  counts_of_both,
  guard,
  guarded_update,
)
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.state import Metrics, TrainState
from llamagen_jax.training.tokenizer_codebook import revive, start_codebook
from llamagen_jax.training.tokenizer_state import InitConfig, TokenizerState
from llamagen_jax.vision import resnet
from llamagen_jax.vision.lpips import lpips
from llamagen_jax.vision.lpips import shapes as lpips_shapes

PERTURBATION_KEY = 1  # folded into the key of a slice


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
    """Returns what reads an image file of the source."""
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
  guard: GuardConfig = GuardConfig()  # of both networks
  init: InitConfig = InitConfig()

  def __post_init__(self):
    if self.discriminator_optimizer.kind != "adamw":
      raise UserError(
        f"discriminator_optimizer.kind={self.discriminator_optimizer.kind!r}:"
        " expected adamw; only the tokenizer is trained by Muon"
      )
    if self.discriminator_optimizer.ema:
      raise UserError(
        f"discriminator_optimizer.ema={self.discriminator_optimizer.ema}: expected 0;"
        " only the tokenizer's weights are averaged"
      )
    self.model.require_codes("model.quantizer='none'")


@dataclasses.dataclass(frozen=True)
class GanPhase:
  """Which terms of the adversarial game a step computes."""

  discriminator: bool = False  # it is trained
  adversarial: bool = False  # the generator feels it


def gan_phases(loss: LossConfig) -> dict[int, GanPhase]:
  """Returns the phases by the step that each begins with."""
  if not loss.adversarial_weight:
    return {0: GanPhase()}
  begin = loss.disc_start - loss.disc_warmup_steps
  return {0: GanPhase(), begin: GanPhase(True), loss.disc_start: GanPhase(True, True)}


def schedules(recipe: TokenizerRecipe) -> dict[str, optax.Schedule]:
  """Returns the learning rates; that of the discriminator counts its own updates."""
  r = recipe
  begin = r.loss.disc_start - r.loss.disc_warmup_steps
  own_steps = max(1, r.run.steps - begin)
  return {
    "optimizer": learning_rate(r.optimizer, r.run.steps),
    "discriminator_optimizer": learning_rate(r.discriminator_optimizer, own_steps),
  }


def init_state(recipe: TokenizerRecipe, key: jax.Array) -> TokenizerState:
  """Returns a fresh state with boxed parameters; LPIPS is filled in by `load`."""
  r = recipe
  generator = TrainState.create(
    init_tokenizer(r.model, key), _optimizer(r), r.optimizer.ema > 0
  )
  discriminator = lecam = None
  if r.loss.adversarial_weight:
    params = init_discriminator(r.discriminator, r.data.image_size, key)
    discriminator = TrainState.create(params, _disc_optimizer(r), ema=False)
    if r.loss.lecam_weight:
      lecam = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
  frozen = {"lpips": None, "resnet": None}
  if r.loss.perceptual_weight and r.loss.perceptual == "lpips":
    frozen["lpips"] = _zeros(lpips_shapes())
  elif r.loss.perceptual_weight:
    frozen["resnet"] = _zeros(resnet.shapes())
  window = codebook.empty_window()
  return TokenizerState(generator, discriminator, window=window, lecam=lecam, **frozen)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def train_step(
  recipe: TokenizerRecipe, phase: GanPhase, state: TokenizerState, batch: Batch
) -> tuple[TokenizerState, Metrics]:
  """Updates both networks on a batch of uint8 images [B, H, W, 3].

  The generator comes first; the discriminator sees the reconstructions from before
  that update, and both gradients are of the discriminator from before its own.
  """
  r = recipe
  key = jax.random.fold_in(jax.random.key(r.run.seed), state.step)
  dropout_key, codebook_key = jax.random.split(key)
  images = from_uint8(batch["image"])
  state = start_codebook(r, state, images, codebook_key)

  (generator_grads, disc_grads, metrics), (codes, latents) = _accumulated(
    functools.partial(gradients, r, phase, state), images, dropout_key,
    r.data.accumulate,
  )  # fmt: skip
  metrics["grad_norm"] = optax.global_norm(generator_grads)
  metrics["lr"] = schedules(r)["optimizer"](state.step)
  generator, metrics["update_norm"], skipped = guarded_update(
    r.guard, state.generator, generator_grads, metrics["loss"], _optimizer(r),
    r.optimizer.ema,
  )  # fmt: skip
  metrics |= skipped
  discriminator, lecam = state.discriminator, state.lecam
  if phase.discriminator:
    metrics["discriminator_grad_norm"] = optax.global_norm(disc_grads)
    discriminator, metrics["discriminator_update_norm"], counts = guarded_update(
      r.guard, discriminator, disc_grads, metrics["discriminator_loss"],
      _disc_optimizer(r), 0.0,
    )  # fmt: skip
    metrics |= counts_of_both(skipped, counts)
    if lecam is not None:
      logits = {name: metrics[f"logits_{name}"] for name in lecam}
      lecam = averaged_logits(lecam, logits, r.loss.lecam_decay)

  window = codebook.push(state.window, codes)
  counts_K = codebook.counts(window, r.model.codebook_size)
  metrics |= codebook.usage(counts_K)
  if r.codebook.restart_every:
    generator = revive(r, generator, latents, counts_K, codebook_key)
  new = state.replace(
    generator=generator, discriminator=discriminator, window=window, lecam=lecam
  )
  return new, metrics


def gradients(
  recipe: TokenizerRecipe,
  phase: GanPhase,
  state: TokenizerState,
  images: jax.Array,
  key: jax.Array,
) -> tuple[tuple[Any, Any, Metrics], tuple[jax.Array, jax.Array]]:
  """Returns the gradients of both losses on images [B, H, W, 3] in [-1, 1].

  Returns:
    means over the batch: (generator's, discriminator's gradients, loss terms), and
    values of its images: (codes, the latents that they are of).
  """
  grads, reconstructions, quantized, metrics = generator_gradients(
    recipe, phase, state, images, key
  )
  disc_grads = None
  if phase.discriminator:
    disc_grads, disc_metrics = discriminator_gradients(
      recipe, state, images, reconstructions
    )
    metrics |= disc_metrics
  latents_NC = quantized.inputs.reshape(-1, recipe.model.codebook_dim)
  return (grads, disc_grads, metrics), (quantized.codes.ravel(), latents_NC)


def generator_gradients(
  recipe: TokenizerRecipe,
  phase: GanPhase,
  state: TokenizerState,
  images: jax.Array,
  key: jax.Array,
) -> tuple[Any, jax.Array, Quantized, Metrics]:
  """Returns the generator's gradients, reconstructions, codes and loss terms.

  Its backward pass runs once, from the summed gradient at the image; the adaptive
  weight needs no more than one convolution's kernel gradient twice.
  """
  r = recipe

  def perturb(rows, rows_KC):
    perturb_key = jax.random.fold_in(key, PERTURBATION_KEY)
    return codebook.perturb(r.codebook, rows, rows_KC, state.step, perturb_key)

  def forward(params):
    reconstructions, quantized = VQModel(r.model, training=True).apply(
      {"params": params},
      images,
      perturb if r.codebook.perturbed_images else None,
      rngs={"dropout": key},
    )
    return (reconstructions, sum(quantized.losses.values())), quantized

  def likelihood(reconstructions):
    terms = {"reconstruction": reconstruction_loss(r.loss, images, reconstructions)}
    if r.loss.perceptual_weight:
      pair = images, reconstructions, r.model.dtype
      if r.loss.perceptual == "lpips":
        distance_B = lpips(state.lpips, *pair)
      else:
        distance_B = resnet.logits_distance(state.resnet, *pair)
      terms["perceptual"] = r.loss.perceptual_weight * jnp.mean(distance_B)
    return sum(terms.values()), terms

  (reconstructions, quantizer_loss), pull_back, quantized = jax.vjp(
    forward, state.params, has_aux=True
  )
  (loss, metrics), image_grad = jax.value_and_grad(likelihood, has_aux=True)(
    reconstructions
  )
  metrics |= quantized.losses
  metrics["loss"] = loss + quantizer_loss
  if phase.adversarial:
    weight, value, adversarial_grad = _adversarial(
      r, state, reconstructions, image_grad, pull_back
    )
    metrics |= {"adversarial": value, "adaptive_weight": weight}
    weight *= r.loss.adversarial_weight
    metrics["loss"] += weight * value
    image_grad += weight * adversarial_grad
  (grads,) = pull_back((image_grad, jnp.ones(())))
  return grads, reconstructions, quantized, metrics


def _adversarial(
  recipe: TokenizerRecipe,
  state: TokenizerState,
  reconstructions: jax.Array,
  image_grad: jax.Array,
  pull_back: Callable,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the adaptive weight, the adversarial loss and its gradient at the image."""
  r = recipe

  def loss(reconstructions):
    fake = discriminate(r.discriminator, state.discriminator.params, reconstructions)
    return generator_loss(r.loss.generator, fake)

  def last_kernel_grad(image_grad):
    (grads,) = pull_back((image_grad, jnp.zeros(())))
    return grads["decoder"]["conv_out"]["kernel"]

  value, grad = jax.value_and_grad(loss)(reconstructions)
  if not r.loss.adaptive_weight:
    return jnp.ones(()), value, grad
  weight = adaptive_weight(last_kernel_grad(image_grad), last_kernel_grad(grad))
  return weight, value, grad


def discriminator_gradients(
  recipe: TokenizerRecipe,
  state: TokenizerState,
  images: jax.Array,
  reconstructions: jax.Array,
) -> tuple[Any, Metrics]:
  """Returns the discriminator's gradients on real and reconstructed images."""
  r = recipe

  def loss(params):
    real, fake = (
      discriminate(r.discriminator, params, x) for x in (images, reconstructions)
    )
    metrics = {"logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}
    loss = discriminator_loss(r.loss.discriminator, real, fake)
    if r.loss.lecam_weight:
      means = state.lecam["real"], state.lecam["fake"]
      metrics["lecam"] = r.loss.lecam_weight * lecam_loss(real, fake, *means)
      loss += metrics["lecam"]
    return loss, metrics

  (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
    state.discriminator.params
  )
  return grads, metrics | {"discriminator_loss": value}


def _accumulated(compute: Callable, images: jax.Array, key: jax.Array, slices: int):
  """Returns means of the first results of `compute` over slices, all of its second.

  A slice takes every n-th image, so that no image changes its chip. Batch
  statistics and the adaptive weight are those of a slice.
  """
  if slices == 1:
    return compute(images, key)
  split = images.reshape(-1, slices, *images.shape[1:]).swapaxes(0, 1)
  split = constrain(split, None, "batch", None, None, None)
  keys = jax.random.split(key, slices)
  means, _ = jax.eval_shape(compute, split[0], keys[0])

  def add(total, part):
    values, of_images = compute(*part)
    return jax.tree.map(lambda t, v: t + v / slices, total, values), of_images

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), means)
  means, of_images = jax.lax.scan(add, zeros, (split, keys))
  return means, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_images)


def matrix_axes(names: Sequence[str]) -> MatrixAxes | None:
  """Returns the axes of a convolution's matrix, from all it reads to its outputs."""
  return MatrixAxes((0, 1, 2), (3,)) if names[-1] == "kernel" else None


def _optimizer(recipe: TokenizerRecipe) -> optax.GradientTransformation:
  schedule = schedules(recipe)["optimizer"]
  optimizer = make_optimizer(recipe.optimizer, schedule, matrix_axes)
  return guard(optimizer, recipe.guard)


def _disc_optimizer(recipe: TokenizerRecipe) -> optax.GradientTransformation:
  schedule = schedules(recipe)["discriminator_optimizer"]
  optimizer = make_optimizer(recipe.discriminator_optimizer, schedule)
  return guard(optimizer, recipe.guard)
