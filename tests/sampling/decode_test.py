import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPT, SamplingConfig, generate, interop
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.sampling import decode
from tests import parity
from tests.gpt.model_test import TINY, TINY_CAPTION, inputs, random_params

GREEDY = {
  "nocfg": SamplingConfig(greedy=True),
  "cfg": SamplingConfig(guidance_scale=3.0, greedy=True),
  "interval": SamplingConfig(guidance_scale=3.0, guidance_stop=5, greedy=True),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_classes_equal_the_original(name):
  golden = parity.golden()
  config, params = interop.gpt_from_torch(
    parity.state_dict("gpt_tiny_c2i"), num_heads=4, image_tokens=16
  )
  key = jax.random.key(0)
  codes = generate(config, params, golden["c2i_labels"], key, sampling=GREEDY[name])
  np.testing.assert_array_equal(codes, golden[f"c2i_greedy_{name}"])


@pytest.mark.parametrize("name", ["nocfg", "cfg"])
def test_greedy_captions_equal_the_original(name):
  golden = parity.golden()
  config, params = interop.gpt_from_torch(
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


@pytest.mark.parametrize("config", [TINY, TINY_CAPTION], ids=["class", "caption"])
def test_greedy_codes_are_those_of_the_full_forward(config):
  """Every drawn code is the best one after the codes before it, guidance included."""
  params, (_, condition, mask) = random_params(config), inputs(config)
  sampling = SamplingConfig(guidance_scale=2.5, greedy=True)
  codes = generate(config, params, condition, jax.random.key(0), mask, sampling)
  drop = jnp.ones(len(codes), bool)
  model = GPT(config)
  cond = model.apply({"params": params}, codes, condition, mask)
  uncond = model.apply({"params": params}, codes, condition, mask, drop)
  guided = uncond + 2.5 * (cond - uncond)
  np.testing.assert_array_equal(codes, jnp.argmax(guided, axis=-1))


def test_a_picture_depends_on_its_key_and_not_on_its_neighbours():
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


def test_trained_and_decoding_parameters_draw_the_same():
  params, (_, labels, _) = random_params(TINY), inputs(TINY)
  key = jax.random.key(0)
  np.testing.assert_array_equal(
    generate(TINY, params, labels, key),
    generate(TINY, decoding_params(TINY, params), labels, key),
  )


def test_a_cache_that_grows_draws_the_same(monkeypatch):
  params, (_, labels, _) = decoding_params(TINY, random_params(TINY)), inputs(TINY)
  sampling = SamplingConfig(guidance_scale=2.0, top_k=20)
  assert decode.segment_ends(TINY) == [TINY.image_tokens]
  at_once = generate(TINY, params, labels, jax.random.key(0), sampling=sampling)
  monkeypatch.setattr(decode, "SHORTEST_SEGMENT", 3)
  assert len(decode.segment_ends(TINY)) == 3
  jax.clear_caches()
  in_parts = generate(TINY, params, labels, jax.random.key(0), sampling=sampling)
  np.testing.assert_array_equal(in_parts, at_once)


def test_pictures_may_be_at_different_codes():
  """A batch whose pictures have come to codes 3 and 6: what a server's slots need."""
  c, params = TINY, decoding_params(TINY, random_params(TINY))
  labels = np.array([2, 5])
  codes_TB = np.random.default_rng(0).integers(0, c.vocab_size, (7, 2))
  logits, cache = decode.prefill(c, params, labels, None, True, c.prefix_tokens + 15)
  logits, caches = [logits], [cache]
  for index in range(1, 8):
    row, cache = decode.decode_step(
      c, params, codes_TB[index - 1], index, caches[-1], None, True
    )
    logits.append(row)
    caches.append(cache)

  def mixed(a, b):  # picture 0 from a, picture 1 from b: two rows each
    return jnp.concatenate([a[:2], b[2:]])

  index = jnp.array([3, 6])
  code_B = np.array([codes_TB[2, 0], codes_TB[5, 1]])
  found, _ = decode.decode_step(
    c, params, code_B, index, jax.tree.map(mixed, caches[2], caches[5]), None, True
  )
  np.testing.assert_allclose(found, mixed(logits[3], logits[6]), atol=1e-5)
