"""Objectives beyond plain likelihood, against the published implementations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamagen_jax as lg
from llamagen_jax import UserError
from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.conditioning import attention_mask, embed_prefix
from llamagen_jax.gpt.model import embed_codes, init_gpt, patches
from llamagen_jax.gpt.objective import (
  ObjectiveConfig,
  ObjectivePhase,
  contrastive_loss,
  cross_entropy,
  guidance_free_logits,
  noisy_codes,
  patch_cross_entropy,
  random_orders,
)
from llamagen_jax.parallel.mesh import unbox
from tests import parity, tiny
from tests.gpt.tiny_gpt import forward, prefill, step

CLOSE = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)


@functools.cache
def model(name):
  """(config, parameters) of a golden transformer: 4 heads, 4 x 4 codes."""
  state = parity.synthesize(parity.beyond_manifest()[name])
  return lg.weights.gpt_from_torch(state, num_heads=4, image_tokens=16)


def golden(name, *fields):
  numbers = parity.golden()
  return [jnp.asarray(numbers[f"{name}_{field}"]) for field in fields]


def log_likelihood(config, params, codes, labels, drop=None):
  logits = forward(config, params, codes, labels, drop=drop)
  return -jnp.sum(cross_entropy(logits, codes), axis=1)


@pytest.mark.parametrize("patch", [1, 2])
def test_next_patch_prediction(patch):
  """Loss, and its gradient at the code embedding."""
  config, params = model("npp_tiny")
  codes, labels, loss, grad = golden(
    "npp", "codes", "labels", f"loss_p{patch}", f"grad_embedding_p{patch}"
  )

  @jax.jit
  @jax.value_and_grad
  def found(table):
    weights = params | {"code_embedding": table}
    logits = forward(config, weights, codes, labels, patch=patch)
    if patch == 1:
      return jnp.mean(cross_entropy(logits, codes))
    return jnp.mean(patch_cross_entropy(logits, patches(codes, config.grid, patch)))

  value, table_grad = found(jnp.asarray(params["code_embedding"]))
  CLOSE(value, loss)
  scale = np.abs(grad).max()
  np.testing.assert_allclose(table_grad / scale, grad / scale, atol=1e-5)


def test_patches_are_squares_in_raster_order():
  codes = jnp.arange(16)[None]
  expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
  np.testing.assert_array_equal(patches(codes, 4, 2)[0], expected)
  expected = [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
  np.testing.assert_array_equal(patches(codes, (2, 8), 2)[0], expected)


def test_patches_of_a_wide_grid_are_predicted_from_those_before():
  config = dataclasses.replace(tiny.GPT, grid=(2, 4))
  params = unbox(init_gpt(config, jax.random.key(0)))
  params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)

  def logits(codes_hw):
    codes, label = codes_hw.reshape(1, -1), jnp.array([1])
    return forward(config, params, codes, label, patch=2)[0]

  codes = np.arange(8).reshape(2, 4)
  plain = logits(codes)
  assert plain.shape == (2, config.vocab_size)
  for place in np.ndindex(2, 4):
    changed = codes.copy()
    changed[place] = 20
    same = (logits(changed) == plain).all(axis=1)
    assert same.tolist() == [True, place[1] >= 2]


def test_contrastive_alignment():
  config, params = model("cca_tiny")
  names = parity.beyond_manifest()["cca_tiny"]
  state = {
    name: parity.tensor(name, tuple(shape))
    + np.float32(0.05) * parity.randn(f"ref/{name}", tuple(shape))
    for name, shape in names.items()
  }
  reference = lg.weights.gpt_from_torch(state, num_heads=4, image_tokens=16)[1]
  codes, labels, null, right, wrong, loss = golden(
    "cca", "codes", "labels", "null", "logratio_pos", "logratio_neg", "loss"
  )
  rolled = jnp.roll(labels, -1)
  ratios = [
    log_likelihood(config, params, codes, label, null)
    - log_likelihood(config, reference, codes, label, null)
    for label in (labels, rolled)
  ]
  CLOSE(ratios[0], right)
  CLOSE(ratios[1], wrong)
  # The golden loss has beta .02 at 16 codes.
  objective = ObjectiveConfig(contrastive_beta=0.02 * 16 / 576)
  alone = null | (labels == rolled)
  CLOSE(jnp.mean(contrastive_loss(objective, *ratios, alone, tokens=16)), loss)


def test_guidance_free_training():
  config, params = model("gft_tiny")
  assert config.guidance_embedding
  codes, labels, beta = golden("gft", "codes", "labels", "beta")
  with_beta, without, null, loss = golden(
    "gft", "logits", "logits_no_beta", "logits_null", "loss"
  )

  def logits(beta, drop=None):
    return forward(config, params, codes, labels, drop=drop, guidance_beta=beta)

  found = logits(beta)
  CLOSE(found, with_beta)
  CLOSE(logits(None), without)
  alone = logits(jnp.ones(4), jnp.ones(4, bool))
  CLOSE(alone, null)
  mixed = guidance_free_logits(found, alone, beta)
  CLOSE(jnp.mean(cross_entropy(mixed, codes)), loss)


def test_no_gradient_into_the_unconditional_logits():
  x, y, beta = jnp.ones((2, 3, 5)), jnp.ones((2, 3, 5)), jnp.array([0.25, 1.0])
  grads = jax.grad(
    lambda a, b: jnp.sum(guidance_free_logits(a, b, beta)), argnums=(0, 1)
  )(x, y)
  np.testing.assert_array_equal(grads[0][:, 0, 0], beta)
  np.testing.assert_array_equal(grads[1], 0)


@pytest.fixture(scope="module")
def any_order():
  """A model with a target embedding, and its parameters, none of them zero."""
  config = dataclasses.replace(tiny.GPT, target_embedding=True)
  params = unbox(init_gpt(config, jax.random.key(0)))
  for number, name in enumerate(("head", "target_embedding")):
    noise = jax.random.normal(jax.random.key(number + 1), params[name].shape)
    params[name] = 0.3 * noise
  return config, params


def test_raster_order_is_the_plain_model(any_order):
  """With the embedding at zero it is the model without one, whatever the order is."""
  config, params = any_order
  codes = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
  labels, raster = jnp.array([1, 3]), jnp.tile(jnp.arange(9), (2, 1))

  def logits(config, params, order=None):
    return forward(config, params, codes, labels, order_BT=order)

  np.testing.assert_allclose(
    logits(config, params, raster), logits(config, params), atol=1e-6
  )
  zero = params | {"target_embedding": jnp.zeros_like(params["target_embedding"])}
  plain = {name: leaf for name, leaf in params.items() if name != "target_embedding"}
  np.testing.assert_array_equal(logits(config, zero), logits(tiny.GPT, plain))


def test_a_code_sees_those_before_it_in_its_order_alone(any_order):
  """By the gradient of every code's logit at every code's embedding."""
  config, params = any_order
  order = jnp.array([[4, 0, 8, 2, 6, 1, 7, 3, 5]])
  codes, label = jnp.arange(10, 19)[None], jnp.array([2])

  def loglik(table):
    weights = params | {"code_embedding": table}
    logits = forward(config, weights, codes, label, order_BT=order)
    return jax.nn.log_softmax(logits)[0, :, 0]

  grads = jax.jit(jax.jacrev(loglik))(params["code_embedding"])  # [T, V, D]
  seen = np.abs(grads).max(-1)[:, 10:19] > 0  # by the codes' positions
  for place in range(9):
    before = set(np.asarray(order[0, :place]).tolist())
    assert set(np.flatnonzero(seen[place]).tolist()) == before


def test_cached_decoding_in_any_order_equals_the_full_forward(any_order):
  """Every row has an order of its own, and row 1 no condition."""
  config, params = any_order
  rng = np.random.default_rng(1)
  codes = jnp.asarray(rng.integers(0, 50, (2, 9)))
  order = jnp.asarray([rng.permutation(9) for _ in range(2)])
  labels, drop = jnp.array([1, 3]), jnp.array([False, True])
  full = forward(config, params, codes, labels, drop=drop, order_BT=order)
  flat, cache = decoding_params(config, params), init_cache(config, 2, config.length)
  prefix = embed_prefix(config, params, labels, drop)
  mask = attention_mask(config, None, jnp.arange(1))
  logits, cache = prefill(config, flat, prefix, cache, mask, order_BT=order)
  np.testing.assert_allclose(logits, full[:, 0], atol=1e-5)
  permuted = jnp.take_along_axis(codes, order, axis=1)
  for t in range(1, 9):
    x = embed_codes(params["code_embedding"], permuted[:, t - 1 : t], config.dtype)
    mask = attention_mask(config, None, jnp.array([t]))
    logits, cache = step(config, flat, x, cache, t, mask, order_BT=order)
    np.testing.assert_allclose(logits, full[:, t], atol=1e-5)


def test_orders_depend_on_step_and_row_and_are_annealed():
  config = ObjectiveConfig(random_order=(10, 20))
  raster = np.arange(9)

  def orders(step, size=256):
    key = jax.random.fold_in(jax.random.key(0), step)
    return np.asarray(random_orders(config, key, jnp.asarray(step), size, 9))

  np.testing.assert_array_equal(orders(3), orders(3))
  np.testing.assert_array_equal(orders(3, 8), orders(3)[:8])
  assert (np.sort(orders(3)) == raster).all()
  shares = [(orders(step) != raster).any(axis=1).mean() for step in (3, 15, 20)]
  assert shares[0] > 0.98
  assert 0.35 < shares[1] < 0.65
  assert shares[2] == 0


def test_noise_replaces_up_to_a_share_of_the_codes_of_each_image():
  codes = jnp.full((2000, 64), 7)
  for most in (0.0, 0.5):
    config = ObjectiveConfig(code_noise=most)
    noisy = np.asarray(noisy_codes(config, codes, 50, jax.random.key(0)))
    shares = np.mean(noisy != 7, axis=1) * 50 / 49  # one code in 50 is drawn again
    deviation = most / 12**0.5 / 2000**0.5
    assert abs(shares.mean() - most / 2) <= 4 * deviation
    assert shares.max() <= min(1, most + 4 * 0.5 / 8)
    assert set(np.unique(noisy)) == (set(range(50)) if most else {7})


def test_phases_of_a_run():
  both = ObjectiveConfig(patch_phases=((4, 10), (2, 20)), random_order=(40, 50))
  assert both.phases() == {
    0: ObjectivePhase(4), 10: ObjectivePhase(2), 30: ObjectivePhase(1, True),
    50: ObjectivePhase(),
  }  # fmt: skip
  assert ObjectiveConfig().phases() == {0: ObjectivePhase()}


@pytest.mark.parametrize(
  "fields, model_fields, words",
  [
    ({"patch_phases": ((2, 5),)}, {}, "patches of side 2 do not divide .* 3x3"),
    ({"patch_phases": ((2, 5),)}, {"grid": (4, 3)}, "side 2 do not divide .* 4x3"),
    ({"patch_phases": ((2,),)}, {}, "expected pairs"),
    ({"random_order": (5, 9)}, {}, "expected model.target_embedding=True"),
    ({"random_order": (9, 5)}, {}, "random_order=.9, 5.: expected"),
    (
      {"random_order": (5, 9)}, {"target_embedding": True, "condition": "caption"},
      "expected model.condition='class'",
    ),
    ({"kind": "guidance-free"}, {}, "expected model.guidance_embedding=True"),
    ({"kind": "contrastive"}, {"condition": "caption"}, "model.condition='class'"),
    ({"kind": "other"}, {}, "expected one of likelihood"),
    ({"code_noise": 1.5}, {}, "code_noise=1.5: expected 0 .. 1"),
    ({"kind": "contrastive", "code_noise": 0.1}, {}, "has no code_noise"),
    ({"kind": "contrastive", "random_order": (1, 2)}, {}, "has no patch_phases"),
  ],
)  # fmt: skip
def test_objectives_that_do_not_fit_are_refused(fields, model_fields, words):
  with pytest.raises(UserError, match=words):
    ObjectiveConfig(**fields).check(dataclasses.replace(tiny.GPT, **model_fields))


def test_an_any_order_model_is_not_exported(any_order):
  with pytest.raises(UserError, match="model.target_embedding: the PyTorch model has"):
    lg.weights.gpt_to_torch(*any_order)


def test_the_guidance_embedding_goes_there_and_back():
  state = parity.synthesize(parity.beyond_manifest()["gft_tiny"])
  found = lg.weights.gpt_to_torch(*model("gft_tiny"))
  assert found.keys() == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(found[name], value)
