import jax
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.sampling.keys import as_keys, image_keys


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_keys_are_those_of_jax(seed):
  rows = np.array([0, 1, 5, 70_000, 2**32 - 1])
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  expected = fold(jax.random.key(seed), rows.astype(np.uint32))
  keys = as_keys(image_keys(seed, rows))
  np.testing.assert_array_equal(
    jax.random.key_data(keys), jax.random.key_data(expected)
  )


def test_all_64_bits_of_a_seed_count():
  seeds = [5 + (1 << bit) for bit in (31, 32, 47, 63)] + [5]
  keys = {tuple(image_keys(seed, [0])[0]) for seed in seeds}
  assert len(keys) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**20])
def test_a_seed_of_more_bits_is_refused(seed):
  with pytest.raises(UserError, match=f"seed={seed}: expected 0"):
    image_keys(seed, [0])
