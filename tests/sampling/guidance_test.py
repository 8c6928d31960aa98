import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, generate
from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES
from llamagen_jax.sampling.guidance import guide, scale_at
from tests.gpt.tiny_gpt import TINY, forward, inputs, random_params

TOKENS = 16


def scales(**fields):
  """The scale of each of TOKENS codes."""
  settings = SamplingConfig(**fields).for_batch(1)
  return np.array(
    [float(scale_at(settings, jnp.int32(t), TOKENS)[0]) for t in range(TOKENS)]
  )


def test_constant_schedule_and_its_stop():
  np.testing.assert_array_equal(scales(guidance_scale=3.0), np.full(TOKENS, 3.0))
  # Step 5 after the prefill samples code 6, the last one that is guided.
  stopped = scales(guidance_scale=3.0, guidance_stop=5)
  np.testing.assert_array_equal(stopped, [3.0] * 7 + [1.0] * 9)


SHARES = {
  "constant": lambda t: np.ones_like(t),
  "linear": lambda t: t,
  "power-cosine": lambda t: (1 - np.cos(np.pi * t**1.5)) / 2,
}


@pytest.mark.parametrize("name", GUIDANCE_SCHEDULES)
def test_schedules(name):
  found = scales(guidance_scale=16.0, guidance_schedule=name, guidance_power=1.5)
  expected = 1 + 15 * SHARES[name](np.arange(TOKENS) / TOKENS)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scale_one_is_the_condition_to_the_bit():
  cond = jnp.array([[0.1, 0.2], [0.3, 0.7]])
  uncond = jnp.array([[0.9, -0.4], [0.25, 0.1]])
  guided = guide(cond, uncond, jnp.array([1.0, 3.0]))
  np.testing.assert_array_equal(guided[0], cond[0])
  np.testing.assert_allclose(guided[1], uncond[1] + 3 * (cond[1] - uncond[1]))


def test_guidance_starts_late():
  late = scales(guidance_scale=3.0, guidance_start=2, guidance_stop=4)
  np.testing.assert_array_equal(late, [1.0] * 2 + [3.0] * 4 + [1.0] * 10)


@pytest.mark.parametrize("window", [1, 4])
def test_guidance_free_models_get_their_strength(window):
  """Greedy codes are the best ones of the full model at that strength, in one row."""
  config = dataclasses.replace(TINY, guidance_embedding=True)
  params, (_, labels, _) = random_params(config), inputs(config)
  sampling = SamplingConfig(guidance_beta=0.6, greedy=True, window=window)
  codes = generate(config, params, labels, jax.random.key(0), sampling=sampling)
  beta = jnp.full(len(labels), 0.6)
  logits = forward(config, params, codes, labels, guidance_beta=beta)
  np.testing.assert_array_equal(codes, jnp.argmax(logits, axis=-1))
