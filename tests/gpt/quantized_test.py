import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, generate
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.quantized import Int8Matrix, matmul, quantize, quantize_params
from tests.gpt.tiny_gpt import TINY, inputs, random_params


def test_a_matrix_is_rounded_to_half_a_step():
  matrix = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
  matrix[1, 3] = 0
  small = quantize(jnp.asarray(matrix))
  assert small.values.dtype == jnp.int8 and np.abs(small.values).max() == 127
  error = np.abs(small.values * small.scale[..., None] - matrix)
  assert (error <= np.asarray(small.scale)[..., None] / 2 + 1e-6).all()
  assert (np.asarray(small.values)[1, 3] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_rounded_matrix(dtype):
  rng = np.random.default_rng(0)
  small = quantize(jnp.asarray(rng.standard_normal((2, 5, 7), np.float32)))
  x = jnp.asarray(rng.standard_normal((3, 1, 7)), dtype)
  product = matmul("CFD,BTD->CFBT", small, x)
  whole = small.values * small.scale[..., None]
  expected = np.einsum("CFD,BTD->CFBT", whole, x.astype(jnp.float32))
  assert product.dtype == dtype
  tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
  np.testing.assert_allclose(
    product.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance
  )


def test_models_of_8_bits_sample_nearly_the_same():
  """Same noise: most codes stay; and every matrix is in fact in 8 bits."""
  config = dataclasses.replace(TINY, kv_heads=2)
  _, labels, _ = inputs(config)
  params = decoding_params(config, random_params(config))
  small = quantize_params(params)
  is_matrix = lambda leaf: isinstance(leaf, Int8Matrix)  # noqa: E731
  matrices = [m for m in jax.tree.leaves(small, is_leaf=is_matrix) if is_matrix(m)]
  assert len(matrices) == 4 * config.layers + 1
  labels = np.arange(40) % config.num_classes
  sampling = SamplingConfig(guidance_scale=2.0)
  key = jax.random.key(0)
  first, second = (
    np.asarray(generate(config, p, labels, key, sampling=sampling))
    for p in (params, small)
  )
  assert np.mean(first[:, 0] == second[:, 0]) > 0.85
  assert 0.5 < np.mean(first == second) < 1
