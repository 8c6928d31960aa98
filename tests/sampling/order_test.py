"""Orders of decoding: permutations by key, and the codes that full forwards give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, UserError, generate
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.sampling.decode import DecodeInputs, decode_codes, decode_windows
from llamagen_jax.sampling.logits import sample_codes
from llamagen_jax.sampling.order import decoding_order, to_raster
from tests.gpt.tiny_gpt import TINY, TINY_CAPTION, forward, inputs, random_params

pytestmark = pytest.mark.exact

ANY_ORDER = dataclasses.replace(TINY, target_embedding=True, grid=(3, 4))
T = ANY_ORDER.image_tokens
LABELS = np.array([1, 5, 2, 6])
KEYS = jax.random.split(jax.random.key(7), 4)
SAMPLING = SamplingConfig(guidance_scale=2.0, top_k=20, top_p=0.95, order="random")


@pytest.fixture(scope="module")
def params():
  return decoding_params(ANY_ORDER, random_params(ANY_ORDER))


def test_random_orders_are_permutations_by_the_key_alone():
  assert decoding_order("raster", KEYS, T) is None
  assert decoding_order("known-first", KEYS, T) is None
  order = np.asarray(decoding_order("random", KEYS, T))
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(T), (4, 1)))
  assert len({tuple(row) for row in order}) == 4
  np.testing.assert_array_equal(decoding_order("random", KEYS[2:3], T), order[2:3])


@pytest.mark.parametrize("name", ["known-first", "random"])
def test_known_codes_come_first_and_all_go_back(name):
  known = np.random.default_rng(0).random((4, T)) < 0.5
  order = decoding_order(name, KEYS, T, known)
  in_order = np.take_along_axis(known, np.asarray(order), axis=1)
  np.testing.assert_array_equal(in_order, -np.sort(-in_order.astype(int), axis=1))
  codes = jnp.tile(jnp.arange(T) + 100, (4, 1))
  there = jnp.take_along_axis(codes, order, axis=1)
  np.testing.assert_array_equal(to_raster(there, order), codes)
  assert to_raster(codes, None) is codes


@pytest.mark.parametrize("window", [1, 3])
def test_the_order_of_the_raster_is_raster_order(params, window):
  plain = dataclasses.replace(SAMPLING, order="raster", window=window)
  expected = generate(ANY_ORDER, params, LABELS, KEYS, sampling=plain)
  arrays = DecodeInputs(params, KEYS, None, plain.for_batch(4))
  identity = jnp.tile(jnp.arange(T), (4, 1))
  shape = (ANY_ORDER, plain.active_filters)
  if window == 1:
    codes = decode_codes(*shape, arrays, LABELS, identity)
  else:
    codes, _ = decode_windows(*shape, window, arrays, LABELS, identity)
  np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("caption", [False, True])
def test_random_orders_sample_what_full_forwards_do(caption):
  """A code at a time, from the logits of all codes before it, without a cache."""
  config = ANY_ORDER
  if caption:
    config = dataclasses.replace(TINY_CAPTION, target_embedding=True)
  params, (_, condition, mask) = random_params(config), inputs(config)
  keys, count = KEYS[: len(condition)], config.image_tokens
  found = generate(config, params, condition, keys, mask, SAMPLING)
  order = decoding_order("random", keys, count)
  rows, everyone = np.arange(len(keys)), jnp.ones(len(keys), bool)
  draw = jax.jit(sample_codes, static_argnums=3)
  codes = np.zeros((len(keys), count), np.int32)
  for t in range(count):
    logits, null = (
      forward(config, params, codes, condition, mask, drop, order_BT=order)[:, t]
      for drop in (~everyone, everyone)
    )
    guided = null + 2.0 * (logits - null)
    noise = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    settings = SAMPLING.for_batch(len(keys))
    codes[rows, order[:, t]] = draw(guided, noise, settings, SAMPLING.active_filters)
  np.testing.assert_array_equal(found, codes)
  raster = dataclasses.replace(SAMPLING, order="raster")
  assert (generate(config, params, condition, keys, mask, raster) != codes).any()


def test_an_image_does_not_depend_on_its_neighbours(params):
  together = generate(ANY_ORDER, params, LABELS, KEYS, sampling=SAMPLING)
  rows = np.array([3, 1])
  apart = generate(ANY_ORDER, params, LABELS[rows], KEYS[rows], sampling=SAMPLING)
  np.testing.assert_array_equal(apart, together[rows])


def test_windows_have_the_same_codes(params):
  expected = generate(ANY_ORDER, params, LABELS, KEYS, sampling=SAMPLING)
  fast = dataclasses.replace(SAMPLING, window=4)
  codes = generate(ANY_ORDER, params, LABELS, KEYS, sampling=fast)
  np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("order", ["random", "known-first"])
def test_a_model_of_raster_order_has_no_other(order):
  sampling = SamplingConfig(order=order)
  with pytest.raises(UserError, match=f"^order={order}: .*; expected --order=raster$"):
    generate(TINY, random_params(TINY), LABELS, KEYS, sampling=sampling)


def test_an_unknown_order_is_refused():
  with pytest.raises(UserError, match="order=snake: expected one of raster, random"):
    SamplingConfig(order="snake")
