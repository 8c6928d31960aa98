import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, UserError
from llamagen_jax.sampling.logits import keep_top_k, keep_top_p, sample_codes
from tests import parity


@pytest.mark.parametrize("k, p", [(5, 1.0), (0, 0.7), (20, 0.5)])
def test_filters_equal_the_original(k, p):
  logits = parity.golden()["filter_in"]
  rows = len(logits)
  found = keep_top_k(logits, jnp.full(rows, k))
  found = keep_top_p(found, jnp.full(rows, p))
  np.testing.assert_array_equal(found, parity.golden()[f"filter_k{k}_p{p}"])


def test_every_row_has_its_own_k():
  logits = parity.randn("logits", (5, 300)) * 10
  k = np.array([0, 1, 17, 300, 1000])
  kept = np.isfinite(keep_top_k(logits, jnp.array(k))).sum(axis=1)
  np.testing.assert_array_equal(kept, [300, 1, 17, 300, 300])
  best = keep_top_k(logits, jnp.array(k))[2]
  assert set(np.flatnonzero(np.isfinite(best))) == set(np.argsort(logits[2])[-17:])


def test_nucleus_is_the_smallest_set_that_reaches_p():
  logits = parity.randn("logits", (6, 300)) * 3
  p = np.array([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], np.float32)
  kept = np.isfinite(keep_top_p(logits, jnp.array(p)))
  for row in range(5):
    probs = np.sort(np.asarray(jax.nn.softmax(logits[row])))[::-1].astype(np.float64)
    expected = 1 + np.sum(np.cumsum(probs) <= p[row])
    assert kept[row].sum() == expected
  assert kept[5].all()


def test_draws_follow_the_probabilities():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  draws = 4000
  config = SamplingConfig(temperature=1.0)
  keys = jax.random.split(jax.random.key(0), draws)
  codes = sample_codes(
    jnp.tile(logits, (draws, 1)), keys, config.for_batch(draws), config.active_filters
  )
  share = np.bincount(codes, minlength=4) / draws
  np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_draws_what_jax_draws():
  logits = parity.randn("logits", (6, 300))
  keys = jax.random.split(jax.random.key(0), 6)
  config = SamplingConfig()
  found = sample_codes(
    jnp.asarray(logits), keys, config.for_batch(6), config.active_filters
  )
  expected = jax.vmap(jax.random.categorical)(keys, logits)
  np.testing.assert_array_equal(found, expected)


def test_the_first_of_equals_is_the_best():
  logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [jnp.nan, 0.0, 1.0]])
  keys = jax.random.split(jax.random.key(0), 3)
  config = SamplingConfig(greedy=True)
  found = sample_codes(logits, keys, config.for_batch(3), config.active_filters)
  assert found.tolist()[:2] == [1, 0] and 0 <= found[2] < 3


def test_temperature_comes_before_the_nucleus():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  config = SamplingConfig(temperature=0.1, top_p=0.9)
  codes = [
    int(
      sample_codes(
        logits, jax.random.key(i)[None], config.for_batch(1), config.active_filters
      )[0]
    )
    for i in range(50)
  ]
  assert set(codes) == {0}  # at temperature 0.1 the first holds 99 %


@pytest.mark.parametrize(
  "field, value",
  [
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("temperature", 0.0),
    ("guidance_scale", 0.5),
    ("guidance_schedule", "cubic"),
  ],
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(UserError, match=f"{field}={value}: expected"):
    SamplingConfig(**{field: value})
