import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, generate, weights
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.sampling import decode
from tests import parity
from tests.gpt.tiny_gpt import TINY, TINY_CAPTION, forward, inputs, random_params

pytestmark = pytest.mark.exact

WIDE = dataclasses.replace(TINY, grid=(2, 4), target_embedding=True)
GREEDY = {
  "nocfg": SamplingConfig(greedy=True),
  "cfg": SamplingConfig(guidance_scale=3.0, greedy=True),
  "interval": SamplingConfig(guidance_scale=3.0, guidance_stop=5, greedy=True),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_classes_equal_the_original(name):
  golden = parity.golden()
  config, params = weights.gpt_from_torch(
    parity.state_dict("gpt_tiny_c2i"), num_heads=4, image_tokens=16
  )
  key = jax.random.key(0)
  codes = generate(config, params, golden["c2i_labels"], key, sampling=GREEDY[name])
  np.testing.assert_array_equal(codes, golden[f"c2i_greedy_{name}"])


@pytest.mark.parametrize("name", ["nocfg", "cfg"])
def test_greedy_captions_equal_the_original(name):
  golden = parity.golden()
  config, params = weights.gpt_from_torch(
    parity.state_dict("gpt_tiny_t2i"), num_heads=4, image_tokens=16
  )
  codes = generate(
    config,
    params,
    golden["t2i_caption"],
    jax.random.key(0),
    golden["t2i_mask"],
    GREEDY[name],
  )
  np.testing.assert_array_equal(codes, golden[f"t2i_greedy_{name}"])


@pytest.mark.parametrize(
  "config", [TINY, TINY_CAPTION, WIDE], ids=["class", "caption", "wide"]
)
def test_greedy_codes_are_those_of_the_full_forward(config):
  """Every code is the best one after the codes before it, guidance included."""
  params, (_, condition, mask) = random_params(config), inputs(config)
  sampling = SamplingConfig(guidance_scale=2.5, greedy=True)
  codes = generate(config, params, condition, jax.random.key(0), mask, sampling)
  drop = jnp.ones(len(codes), bool)
  cond = forward(config, params, codes, condition, mask)
  uncond = forward(config, params, codes, condition, mask, drop)
  guided = uncond + 2.5 * (cond - uncond)
  np.testing.assert_array_equal(codes, jnp.argmax(guided, axis=-1))


def test_an_image_depends_on_its_key_and_not_on_its_neighbours():
  params = decoding_params(TINY, random_params(TINY))
  sampling = SamplingConfig(guidance_scale=2.0, top_k=20, top_p=0.95)
  labels = np.array([1, 5, 2, 6])
  keys = jax.random.split(jax.random.key(7), 4)
  together = generate(TINY, params, labels, keys, sampling=sampling)
  rows = np.array([3, 1])
  apart = generate(TINY, params, labels[rows], keys[rows], sampling=sampling)
  np.testing.assert_array_equal(apart, together[rows])
  other = generate(TINY, params, labels, keys[::-1], sampling=sampling)
  assert (np.asarray(other) != np.asarray(together)).any()


def test_trained_and_decoding_parameters_sample_the_same():
  params, (_, labels, _) = random_params(TINY), inputs(TINY)
  key = jax.random.key(0)
  np.testing.assert_array_equal(
    generate(TINY, params, labels, key),
    generate(TINY, decoding_params(TINY, params), labels, key),
  )


def test_a_cache_that_grows_samples_the_same(monkeypatch):
  params, (_, labels, _) = decoding_params(TINY, random_params(TINY)), inputs(TINY)
  sampling = SamplingConfig(guidance_scale=2.0, top_k=20)
  assert decode.cache_segment_ends(TINY) == [TINY.image_tokens]
  at_once = generate(TINY, params, labels, jax.random.key(0), sampling=sampling)
  monkeypatch.setattr(decode, "SHORTEST_SEGMENT", 3)
  assert len(decode.cache_segment_ends(TINY)) == 3
  jax.clear_caches()
  in_parts = generate(TINY, params, labels, jax.random.key(0), sampling=sampling)
  np.testing.assert_array_equal(in_parts, at_once)
