"""The joint step of generator and discriminator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamagen_jax import VQModel
from llamagen_jax.tokenizer.discriminator import discriminate
from llamagen_jax.training.guard import GuardConfig
from llamagen_jax.training.tokenizer_codebook import revive
from llamagen_jax.training.tokenizer_step import (
  GanPhase,
  gan_phases,
  train_step,
)
from llamagen_jax.vision.lpips import lpips, shapes
from tests import tiny
from tests.training.tiny_tokenizer import fresh, make_recipe

BOTH = GanPhase(discriminator=True, adversarial=True)


def a_batch(size=4):
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (size, tiny.SIDE, tiny.SIDE, 3), np.uint8)}


@pytest.fixture(scope="module")
def stepped():
  """recipe, state before, batch, state after, metrics."""
  recipe = make_recipe()
  state, batch = fresh(recipe), a_batch()
  after, metrics = jax.jit(functools.partial(train_step, recipe, BOTH))(state, batch)
  return recipe, state, batch, after, metrics


def test_a_step_equals_one_written_out(stepped):
  """Everything by jax.grad from whole losses, one gradient after the other."""
  recipe, state, batch, after, metrics = stepped
  generator, critic = state.generator.params, state.discriminator.params
  x = batch["image"] / 127.5 - 1.0

  def reconstruct(params):
    return VQModel(recipe.model).apply({"params": params}, x)

  def with_kernel(kernel):
    conv_out = generator["decoder"]["conv_out"] | {"kernel": kernel}
    decoder = generator["decoder"] | {"conv_out": conv_out}
    return reconstruct(generator | {"decoder": decoder})[0]

  def l1(y):
    return jnp.mean(jnp.abs(x - y))

  def fooled(y):
    return -jnp.mean(discriminate(recipe.discriminator, critic, y))

  kernel = generator["decoder"]["conv_out"]["kernel"]
  rec_grad = jax.grad(lambda k: l1(with_kernel(k)))(kernel)
  adv_grad = jax.grad(lambda k: fooled(with_kernel(k)))(kernel)
  rec_norm, adv_norm = (jnp.sqrt(jnp.sum(g**2)) for g in (rec_grad, adv_grad))
  weight = rec_norm / (adv_norm + 1e-4)

  def generator_loss(params):
    y, quantized = reconstruct(params)
    losses = quantized.losses
    vq = losses["codebook"] + losses["commitment"] + losses["entropy"]
    return l1(y) + weight * 0.5 * fooled(y) + vq

  y = reconstruct(generator)[0]

  def critic_loss(params):
    real = discriminate(recipe.discriminator, params, x)
    fake = discriminate(recipe.discriminator, params, y)
    return 0.5 * (
      jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + fake))
    )

  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, 0.9, 0.95))
  for loss_fn, params, found, name in (
    (generator_loss, generator, after.generator.params, "loss"),
    (critic_loss, critic, after.discriminator.params, "discriminator_loss"),
  ):
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    updates, _ = adam.update(grads, adam.init(params), params)
    expected = optax.apply_updates(params, updates)
    assert metrics[name] == pytest.approx(float(loss), rel=1e-5)
    # The first update of Adam is lr * sign(g): compared where g is not rounding.
    jax.tree.map(
      lambda e, f, g: np.testing.assert_allclose(
        np.where(np.abs(g) > 1e-6, f, e), e, atol=2e-5
      ),
      expected, found, grads,
    )  # fmt: skip
    jax.tree.map(
      lambda e, f: np.testing.assert_allclose(f, 0.1 * e, atol=1e-6),
      _clipped(grads),
      (after.generator if name == "loss" else after.discriminator)
      .opt_state.inner[1]
      .mu,
    )
  assert metrics["adaptive_weight"] == pytest.approx(float(weight), rel=1e-4)
  # The average moved by a tenth of the way.
  jax.tree.map(
    lambda e, p, q: np.testing.assert_allclose(e, p + 0.1 * (q - p), atol=1e-6),
    after.ema, state.params, after.params,
  )  # fmt: skip


def _clipped(grads):
  norm = optax.global_norm(grads)
  return jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)


def test_every_term_is_logged(stepped):
  metrics = stepped[-1]
  assert {
    "loss", "reconstruction", "codebook", "commitment", "entropy", "adversarial",
    "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake", "usage",
    "perplexity", "grad_norm", "discriminator_grad_norm", "lr",
  } <= metrics.keys()  # fmt: skip
  codes = stepped[3].window[-4 * 64 :]
  assert metrics["usage"] == pytest.approx(len(np.unique(codes)) / 16)


def cost(recipe, stage):
  state = jax.eval_shape(functools.partial(fresh, recipe))
  step = jax.jit(functools.partial(train_step, recipe, stage))
  return step.lower(state, a_batch()).cost_analysis()["flops"]


def test_before_it_starts_the_discriminator_costs_nothing():
  recipe = make_recipe()
  without = make_recipe(loss=dataclasses.replace(recipe.loss, adversarial_weight=0.0))
  before, acting = (cost(recipe, stage) for stage in (GanPhase(), BOTH))
  assert before == cost(without, GanPhase())
  assert before < acting


def test_stages_follow_the_config():
  loss = dataclasses.replace(make_recipe().loss, disc_start=20, disc_warmup_steps=5)
  assert gan_phases(loss) == {0: GanPhase(), 15: GanPhase(True), 20: BOTH}
  now = dataclasses.replace(loss, disc_start=0, disc_warmup_steps=0)
  assert gan_phases(now) == {0: BOTH}
  assert gan_phases(dataclasses.replace(loss, adversarial_weight=0)) == {0: GanPhase()}


@pytest.mark.slow
def test_accumulated_parts_equal_the_whole_batch():
  """Where no term couples the images of a batch."""
  recipe = make_recipe()
  loss = dataclasses.replace(recipe.loss, adversarial_weight=0.0)
  whole = dataclasses.replace(recipe, loss=loss)
  data = dataclasses.replace(whole.data, accumulate=2)
  parts = dataclasses.replace(whole, data=data)
  state, batch = fresh(whole, seed=1), a_batch()
  results = [
    jax.jit(functools.partial(train_step, r, GanPhase()))(state, batch)
    for r in (whole, parts)
  ]
  (a, a_metrics), (b, b_metrics) = results
  for name in a_metrics:
    assert b_metrics[name] == pytest.approx(float(a_metrics[name]), rel=1e-5, abs=1e-7)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    a.generator.opt_state, b.generator.opt_state,
  )  # fmt: skip
  assert sorted(a.window[-256:].tolist()) == sorted(b.window[-256:].tolist())


@pytest.mark.slow
def test_bfloat16_steps_stay_close_to_float32(stepped):
  recipe = stepped[0]
  half = dataclasses.replace(
    recipe,
    model=dataclasses.replace(recipe.model, dtype="bfloat16", remat=True),
    discriminator=dataclasses.replace(recipe.discriminator, dtype="bfloat16"),
  )
  step = jax.jit(functools.partial(train_step, half, BOTH))
  after, metrics = step(stepped[1], stepped[2])
  for name in ("reconstruction", "discriminator_loss"):
    assert metrics[name] == pytest.approx(float(stepped[-1][name]), rel=0.03)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))


@pytest.mark.slow
def test_lecam_adds_its_term_and_averages_logits(stepped):
  recipe, _, batch, plain, without = stepped
  loss = dataclasses.replace(recipe.loss, lecam_weight=0.5, lecam_decay=0.75)
  recipe = dataclasses.replace(recipe, loss=loss)
  state = fresh(recipe).replace(lecam={"real": jnp.float32(-9), "fake": jnp.float32(9)})
  step = jax.jit(functools.partial(train_step, recipe, BOTH))
  after, metrics = step(state, batch)
  assert metrics["lecam"] == 0  # all logits lie between the averages
  assert metrics["discriminator_loss"] == pytest.approx(without["discriminator_loss"])
  for name, mean in (("real", -9), ("fake", 9)):
    expected = mean + 0.25 * (metrics[f"logits_{name}"] - mean)
    assert after.lecam[name] == pytest.approx(expected)
  state = fresh(recipe)  # averages of 0
  after, metrics = step(state, batch)
  critic, images = state.discriminator.params, batch["image"] / 127.5 - 1.0
  shown = VQModel(recipe.model).apply({"params": state.params}, images)[0]
  real, fake = (
    discriminate(recipe.discriminator, critic, image) for image in (images, shown)
  )
  term = jnp.mean(jnp.maximum(0, real) ** 2) + jnp.mean(jnp.maximum(0, -fake) ** 2)
  assert metrics["lecam"] == pytest.approx(0.5 * float(term), rel=1e-4)
  jax.tree.map(np.testing.assert_array_equal, after.params, plain.params)


def test_latents_that_are_not_finite_revive_no_rows():
  recipe = make_recipe()
  recipe = dataclasses.replace(
    recipe, codebook=dataclasses.replace(recipe.codebook, restart_every=1)
  )
  generator, key = fresh(recipe).generator, jax.random.key(1)
  size, width = recipe.model.codebook_size, recipe.model.codebook_dim
  latents, unused = jnp.ones((20, width)), jnp.zeros(size)
  found = [
    revive(recipe, generator, x, unused, key).params["codebook"]
    for x in (latents, latents.at[3].set(jnp.nan))
  ]
  assert (found[0] != generator.params["codebook"]).all()
  np.testing.assert_array_equal(found[1], generator.params["codebook"])


@pytest.mark.slow
def test_a_discriminator_of_nan_alone_is_skipped_and_counted(stepped):
  recipe, _, batch, _, _ = stepped
  recipe = dataclasses.replace(recipe, guard=GuardConfig(skip_nonfinite=True))
  state = fresh(recipe)
  optimizer = jax.tree.map(
    lambda leaf: leaf * jnp.nan if leaf.ndim else leaf, state.discriminator.opt_state
  )
  spoiled = state.replace(
    discriminator=state.discriminator.replace(opt_state=optimizer)
  )
  after, metrics = jax.jit(functools.partial(train_step, recipe, BOTH))(spoiled, batch)
  names = "skipped", "discriminator_skipped", "skipped_in_a_row"
  assert [int(metrics[name]) for name in names] == [0, 1, 1]
  assert int(after.generator.opt_state.skipped) == 0


@pytest.mark.slow
def test_a_step_of_nan_is_skipped_and_counted(stepped):
  recipe, _, batch, _, _ = stepped
  guard = GuardConfig(skip_nonfinite=True)
  loss = dataclasses.replace(recipe.loss, lecam_weight=0.5)
  recipe = dataclasses.replace(recipe, guard=guard, loss=loss)
  state = fresh(recipe)
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.discriminator.params)
  spoiled = state.replace(discriminator=state.discriminator.replace(params=broken))
  step = jax.jit(functools.partial(train_step, recipe, BOTH))
  after, metrics = step(spoiled, batch)
  assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
  assert (after.lecam["real"], after.lecam["fake"]) == (0, 0)
  after, metrics = step(after.replace(discriminator=state.discriminator), batch)
  assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0)
  assert any((a != b).any() for a, b in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True
  ))  # fmt: skip


@pytest.mark.slow
def test_a_perturbed_step_differs_in_the_reconstruction_alone(stepped):
  recipe, state, batch, _, without = stepped
  perturbed = dataclasses.replace(recipe.codebook, perturbed_images=1.0)
  recipe = dataclasses.replace(recipe, codebook=perturbed)
  _, metrics = jax.jit(functools.partial(train_step, recipe, BOTH))(state, batch)
  assert metrics["reconstruction"] != without["reconstruction"]
  for name in ("codebook", "commitment", "usage"):
    np.testing.assert_allclose(metrics[name], without[name], rtol=1e-6)


@pytest.fixture(scope="module")
def lpips_params():
  """Random convolutions of the true shapes; the real ones are not at hand."""
  key = jax.random.key(3)
  return jax.tree.map(
    lambda s: (
      jax.random.normal(key, s.shape) * np.prod(s.shape[:-1]) ** -0.5
      if len(s.shape) > 1
      else jnp.full(s.shape, 0.1)
    ),
    shapes(),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, game",
  [("patchgan", "hinge"), ("stylegan", "non-saturating"), ("patchgan", "vanilla")],
)
def test_a_full_step_with_each_discriminator_game_and_lpips(lpips_params, kind, game):
  """The perceptual term adds itself to the loss and its gradient to the generator's."""
  recipe = make_recipe()
  loss = dataclasses.replace(
    recipe.loss, perceptual_weight=0.5, discriminator=game,
    generator="hinge" if game == "hinge" else "non-saturating",
  )  # fmt: skip
  discriminator = dataclasses.replace(recipe.discriminator, kind=kind)
  recipe = dataclasses.replace(recipe, loss=loss, discriminator=discriminator)
  plain = dataclasses.replace(
    recipe, loss=dataclasses.replace(loss, perceptual_weight=0.0)
  )
  state, batch = fresh(recipe), a_batch(2)
  state = state.replace(lpips=lpips_params)
  (after, metrics), (_, without) = (
    jax.jit(functools.partial(train_step, r, BOTH))(
      state if r is recipe else state.replace(lpips=None), batch
    )
    for r in (recipe, plain)
  )
  images = batch["image"] / 127.5 - 1.0
  shown = VQModel(recipe.model).apply({"params": state.params}, images)[0]
  distance = jnp.mean(lpips(lpips_params, images, shown, "float32"))
  assert metrics["perceptual"] == pytest.approx(0.5 * float(distance), rel=1e-4)
  assert metrics["grad_norm"] != pytest.approx(float(without["grad_norm"]), rel=1e-3)
  critic, x = state.discriminator.params, (images, shown)
  real, fake = (discriminate(discriminator, critic, image) for image in x)
  if game == "hinge":
    expected = jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + fake))
  else:
    expected = -jnp.mean(jax.nn.log_sigmoid(real)) - jnp.mean(jax.nn.log_sigmoid(-fake))
  assert metrics["discriminator_loss"] == pytest.approx(float(expected) / 2, rel=1e-4)
  assert all(np.isfinite(float(value)) for value in metrics.values())
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
