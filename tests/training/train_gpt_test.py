import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPTConfig, UserError
from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.cached import decoding_params, step_forward
from llamagen_jax.gpt.conditioning import attention_mask, embed_condition
from llamagen_jax.gpt.config import PRESETS
from llamagen_jax.gpt.model import embed_codes, init_gpt
from llamagen_jax.gpt.objective import ObjectiveConfig, cross_entropy, objective
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training import gpt_step, train_gpt
from llamagen_jax.training.guard import GuardConfig, guard
from llamagen_jax.training.optimizer import OptimizerConfig, make_optimizer
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from tests import tiny
from tests.gpt.tiny_gpt import forward

STILL = {
  "embedding_dropout": 0.0, "residual_dropout": 0.0, "drop_path": 0.0,
}  # fmt: skip


def recipe(model=tiny.GPT, lr=1e-2, steps=10, **parts):
  return gpt_step.GPTRecipe(
    model=model,
    data=gpt_step.CodeData("", "", 8),
    optimizer=OptimizerConfig(lr, weight_decay=0.05),
    sampling=SamplingConfig(),
    mesh=MeshConfig(),
    run=RunConfig(steps, 0, 1, 0, 100, 1, 0),
    **parts,
  )


def batch(config, size=8):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, config.vocab_size, (size, config.image_tokens))
  labels = rng.integers(0, config.num_classes, size)
  return {"codes": jnp.asarray(codes), "label": jnp.asarray(labels)}


def stepper(r):
  state = unbox(gpt_step.init_state(r, jax.random.key(0)))
  return state, jax.jit(functools.partial(gpt_step.train_step, r))


def test_accumulation_takes_the_step_of_the_big_batch():
  model = dataclasses.replace(tiny.GPT, **STILL)
  results = []
  for slices in (1, 4):
    state, step = stepper(recipe(model, objective=ObjectiveConfig(accumulate=slices)))
    data = batch(model) | {"valid": jnp.array([1, 1, 0, 1, 1, 1, 0, 1.0])}
    first, _ = step(state, data)
    results.append(step(first, data))
  (one, metrics), (four, sliced) = results
  np.testing.assert_allclose(sliced["loss"], metrics["loss"], rtol=1e-6)
  np.testing.assert_allclose(sliced["grad_norm"], metrics["grad_norm"], rtol=1e-6)
  moments = [s.opt_state.inner[1].mu for s in (one, four)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *moments)


def test_slices_must_divide_the_batch():
  state, step = stepper(recipe(objective=ObjectiveConfig(accumulate=3)))
  with pytest.raises(UserError, match="accumulate=3"):
    step(state, batch(tiny.GPT))


def test_smoothing_and_z_loss():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
  codes = jnp.array([[0, 1, 2], [4, 3, 2]])
  loss = cross_entropy(logits, codes)
  found = objective(ObjectiveConfig(label_smoothing=0.2, z_loss=0.1), logits, loss)
  target = 0.8 * jax.nn.one_hot(codes, 5) + 0.2 / 5
  smooth = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
  log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
  np.testing.assert_allclose(found, smooth + 0.1 * log_z**2, rtol=1e-5)
  assert objective(ObjectiveConfig(), logits, loss) is loss


def test_bad_steps_change_nothing():
  config = GuardConfig(skip_nonfinite=True, skip_spike=1.0)
  optimizer = guard(make_optimizer(OptimizerConfig(0.1), lambda step: 0.1), config)
  params = {"w": jnp.ones(2)}
  update = jax.jit(optimizer.update)
  state = optimizer.init(params)
  for _ in range(100):
    updates, state = update({"w": jnp.ones(2)}, state, params, loss=2.0)
  assert (updates["w"] != 0).all()
  for loss, grad in ((3.5, 1.0), (jnp.nan, 1.0), (2.0, jnp.inf)):
    before = state
    updates, state = update({"w": jnp.full(2, grad)}, state, params, loss=loss)
    assert (updates["w"] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, before.inner, state.inner)
  assert (state.taken, state.skipped, state.in_a_row) == (100, 3, 3)
  updates, state = update({"w": jnp.ones(2)}, state, params, loss=2.9)
  assert (updates["w"] != 0).all()
  assert (state.skipped, state.in_a_row) == (3, 0)


def test_the_norm_of_the_update_and_skips_are_logged():
  r = recipe(guard=GuardConfig(skip_nonfinite=True))
  state, step = stepper(r)
  new, metrics = step(state, batch(tiny.GPT))
  leaves = jax.tree.leaves(jax.tree.map(jnp.subtract, new.params, state.params))
  norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in leaves))
  np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-5)
  assert metrics["skipped"] == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_starts_at_ln_16384(name):
  """A tiny twin keeps the preset's heads and vocabulary, and has one layer."""
  heads = PRESETS[name][1]
  model = GPTConfig(1, heads, 4 * heads, grid=2, num_classes=4, qk_norm=name == "XL")
  params = unbox(init_gpt(model, jax.random.key(0)))
  data = batch(model, 2)
  logits = forward(model, params, data["codes"], data["label"])
  loss = jnp.mean(cross_entropy(logits, data["codes"]))
  np.testing.assert_allclose(loss, 9.704, atol=1e-3)


def test_a_skipped_step_leaves_the_average_of_the_weights():
  r = recipe(guard=GuardConfig(skip_nonfinite=True))
  r = dataclasses.replace(r, optimizer=OptimizerConfig(lr=1e-2, ema=0.5))
  state, step = stepper(r)
  state, _ = step(state, batch(tiny.GPT))
  bad = state.replace(params=state.params | {"head": jnp.nan * state.params["head"]})
  new, metrics = step(bad, batch(tiny.GPT))
  assert metrics["skipped_in_a_row"] == 1
  jax.tree.map(np.testing.assert_array_equal, new.ema, state.ema)


def test_scanned_and_unrolled_layers_give_equal_gradients():
  """Unrolled is the cached model, run code by code over the same images."""
  config = dataclasses.replace(tiny.GPT, **STILL)
  params = unbox(init_gpt(config, jax.random.key(0)))
  params["head"] = 0.1 * jax.random.normal(jax.random.key(1), params["head"].shape)
  data = batch(config, 2)
  codes, labels = data["codes"], data["label"]

  def scanned(params):
    logits = forward(config, params, codes, labels)
    return jnp.mean(cross_entropy(logits, codes))

  def unrolled(params):
    flat = decoding_params(config, params)
    condition = {"params": params["condition"]}
    x = embed_condition(config).apply(condition, labels, jnp.zeros(2, bool))
    cache, logits = init_cache(config, 2, config.length), []
    for t in range(config.image_tokens):
      mask = attention_mask(config, None, jnp.array([t]))
      found, cache = step_forward(config, flat, x, cache, t, mask)
      logits.append(found)
      x = embed_codes(params["code_embedding"], codes[:, t : t + 1], config.dtype)
    return jnp.mean(cross_entropy(jnp.stack(logits, axis=1), codes))

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    jax.jit(jax.grad(scanned))(params),
    jax.jit(jax.grad(unrolled))(params),
  )


@pytest.mark.slow
def test_overfits_64_images():
  """Each has a label of its own; else its first code could not be known."""
  model = GPTConfig(
    2, 4, 64, grid=4, num_classes=64, vocab_size=512, condition_dropout=0.0, **STILL
  )
  state, step = stepper(recipe(model, lr=3e-3, steps=300))
  data = batch(model, 64) | {"label": jnp.arange(64)}
  for _ in range(300):
    state, metrics = step(state, data)
  assert metrics["loss"] < 0.1


def test_held_out_classes_have_the_labels_of_the_trained_ones(tmp_path):
  folders = [tiny.write_codes(tmp_path / name) for name in ("train", "val")]
  path = folders[1] / "manifest.json"
  manifest = json.loads(path.read_text())
  r = recipe()
  data = dataclasses.replace(r.data, codes=str(folders[0]), eval_codes=str(folders[1]))
  r = dataclasses.replace(r, data=data)
  path.write_text(json.dumps(manifest | {"class_names": list("badc")}))
  held_out = train_gpt.make_task(r).evaluate.sources[r.model.grid]
  assert [held_out[i].label for i in range(5)] == [1, 0, 3, 2, 1]
  path.write_text(json.dumps(manifest | {"class_names": list("abce")}))
  with pytest.raises(UserError, match="data.eval_codes=.*'e', are not among .*codes="):
    train_gpt.make_task(r)


def test_a_kernel_that_does_not_run_here_is_refused_and_auto_is_not(tmp_path):
  config = tiny.gpt_config(tiny.write_codes(tmp_path / "codes"), steps=1)
  config.model.attention = "splash"
  with pytest.raises(UserError, match="'splash' does not run on cpu"):
    train_gpt.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config.model.attention = "auto"
  assert int(train_gpt.train(config, tmp_path / "run").step) == 1
  saved = json.loads((tmp_path / "run" / "bundle" / "config.json").read_text())
  assert saved["config"]["attention"] == "auto"  # elsewhere it is another one
