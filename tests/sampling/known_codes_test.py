"""Known codes stay, and the others follow the model's distribution given them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPTConfig, SamplingConfig, UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.sampling import decode
from llamagen_jax.sampling.decode import DecodeInputs, generate
from llamagen_jax.sampling.known_codes import KnownCodes, complete_codes, systematic
from llamagen_jax.sampling.order import decoding_order
from tests.gpt.tiny_gpt import TINY, forward, random_params

pytestmark = pytest.mark.exact

LABELS = np.array([1, 5, 2, 6])
SAMPLING = SamplingConfig(guidance_scale=2.0, top_k=20, top_p=0.95)
SMALL = GPTConfig(
  1, 2, 16, grid=2, vocab_size=4, num_classes=3, ffn_multiple=16, condition_dropout=0.0
)


def complete(config, params, labels, given, sampling=SAMPLING, seed=7):
  keys = jax.random.split(jax.random.key(seed), len(labels))
  inputs = DecodeInputs(
    decoding_params(config, params), keys, None, sampling.for_batch(len(labels))
  )
  return np.asarray(complete_codes(config, sampling, inputs, labels, given)[0])


def drawn(config, params, labels, sampling=SAMPLING, seed=7):
  keys = jax.random.split(jax.random.key(seed), len(labels))
  return np.asarray(generate(config, params, labels, keys, sampling=sampling))


@pytest.fixture(scope="module")
def params():
  return random_params(TINY)


def some_codes(share: float) -> KnownCodes:
  rng = np.random.default_rng(0)
  shape = len(LABELS), TINY.image_tokens
  codes = rng.integers(0, TINY.vocab_size, shape, np.int32)
  return KnownCodes(codes, rng.random(shape) < share, candidates=4)


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_known_codes_stay_and_the_others_are_drawn(params, share):
  given = some_codes(share)
  codes = complete(TINY, params, LABELS, given)
  np.testing.assert_array_equal(codes[given.known], given.codes[given.known])
  other = complete(TINY, params, LABELS, given, seed=8)
  assert (codes == other).all() == (share == 1)


def test_nothing_known_is_a_sample(params):
  codes = complete(TINY, params, LABELS, some_codes(0.0))
  np.testing.assert_array_equal(codes, drawn(TINY, params, LABELS))


def test_what_begins_as_a_sample_ends_as_it(params):
  """The key of an image and its first codes decide the rest, beside any neighbour."""
  whole = drawn(TINY, params, LABELS)
  known = np.arange(TINY.image_tokens) < np.array([0, 1, 5, 9])[:, None]
  given = KnownCodes(whole, known, candidates=4)
  np.testing.assert_array_equal(complete(TINY, params, LABELS, given), whole)
  known[0, 4] = True  # this image takes candidates, and the others do with it
  given = KnownCodes(whole, known, candidates=4)
  np.testing.assert_array_equal(complete(TINY, params, LABELS, given)[1:], whole[1:])


def test_a_cache_may_have_more_segments_than_an_image_rows(params, monkeypatch):
  monkeypatch.setattr(decode, "SHORTEST_SEGMENT", 3)
  config = dataclasses.replace(TINY, grid=(2, 8))
  assert len(decode.cache_segment_ends(config)) == 5
  whole = drawn(config, params, LABELS)
  known = np.arange(16) < np.array([0, 1, 8, 11])[:, None]
  given = KnownCodes(whole, known, candidates=4)
  np.testing.assert_array_equal(complete(config, params, LABELS, given), whole)


def conditional(config, params, label, given, known, scale):
  """The probability of all codes [T], a code at a time from the full model's logits."""
  every = np.array(list(itertools.product(range(config.vocab_size), repeat=4)))
  labels = np.full(len(every), label)
  logits = forward(config, params, every, labels)
  drop = jnp.ones(len(every), bool)
  base = forward(config, params, every, labels, drop=drop)
  log_p = jax.nn.log_softmax(base + scale * (logits - base))
  p = np.exp(np.take_along_axis(np.asarray(log_p), every[..., None], 2)[..., 0].sum(1))
  p *= (every == given)[:, known].all(axis=1)
  return every, p / p.sum()


@pytest.mark.slow
def test_many_candidates_reach_the_exact_conditional():
  """Total variation from the enumerated conditional, codes 1 and 3 of 4 known."""
  params = random_params(SMALL, seed=2)
  params = params | {"head": 4 * params["head"]}
  sampling = SamplingConfig(guidance_scale=1.5)
  images, known = 4000, np.array([False, True, False, True])
  given = np.array([0, 3, 0, 1])
  every, p = conditional(SMALL, params, 1, given, known, sampling.guidance_scale)
  distance = {}
  for candidates in (1, 4, 32):
    codes = np.tile(given, (images, 1)).astype(np.int32)
    asked = KnownCodes(codes, np.tile(known, (images, 1)), candidates)
    found = complete(SMALL, params, np.ones(images, int), asked, sampling)
    counts = (found[:, None] == every).all(axis=2).mean(axis=0)
    distance[candidates] = 0.5 * np.abs(counts - p).sum()
  # 4000 draws of up to 16 outcomes are 0.02 from their own distribution.
  assert distance[1] > 2 * distance[4] > 3 * distance[32]
  assert distance[32] < 0.03


@pytest.mark.parametrize("name", ["known-first", "random"])
@pytest.mark.parametrize("grid", [3, (1, 9)])
def test_any_order_models_draw_the_rest_given_all_known_codes(grid, name):
  config = dataclasses.replace(TINY, target_embedding=True, grid=grid)
  params = random_params(config)
  given, sampling = some_codes(0.5), SamplingConfig(greedy=True, order=name)
  codes = complete(config, params, LABELS, given, sampling)
  np.testing.assert_array_equal(codes[given.known], given.codes[given.known])
  keys = jax.random.split(jax.random.key(7), len(LABELS))
  order = np.asarray(decoding_order(name, keys, config.image_tokens, given.known))
  logits = forward(config, params, codes, LABELS, order_BT=order)
  best = np.asarray(jnp.argmax(logits, axis=-1))
  in_order = np.take_along_axis(codes, order, axis=1)
  unknown = ~np.take_along_axis(given.known, order, axis=1)
  np.testing.assert_array_equal(in_order[unknown], best[unknown])


def test_a_raster_model_has_one_order(params):
  given = some_codes(0.5)
  with pytest.raises(UserError, match="learned raster order only"):
    complete(TINY, params, LABELS, given, SamplingConfig(order="known-first"))
  with pytest.raises(UserError, match="candidates=0: expected 1 or more"):
    dataclasses.replace(given, candidates=0)


def test_systematic_resampling_copies_by_weight():
  weight = np.array([[0.5, 0.125, 0.25, 0.125], [0.0, 1.0, 0.0, 0.0]], np.float32)
  keys = jax.random.split(jax.random.key(0), 2)
  source = np.asarray(systematic(jnp.asarray(weight), keys))
  copies = np.stack([np.bincount(row, minlength=4) for row in source])
  assert (np.abs(copies - 4 * weight) < 1).all()
