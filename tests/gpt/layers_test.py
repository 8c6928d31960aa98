"""Products with weights: the gradients written for a CPU are those of the einsum."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llamagen_jax.gpt.layers import product

PRODUCTS = {
  "BTD,DKCH->BTKCH": ((2, 3, 8), (8, 2, 3, 4)),
  "BTKGH,KGHD->BTD": ((2, 3, 2, 1, 4), (2, 1, 4, 8)),
  "BTD,DCF->BTCF": ((2, 3, 8), (8, 2, 5)),
  "BTF,FD->BTD": ((2, 3, 5), (5, 8)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_gradients_are_those_of_the_einsum(equation, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x, matrix = (
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, PRODUCTS[equation], strict=False)
  )
  result = jnp.float32  # as of the logits
  derived = functools.partial(jnp.einsum, equation, preferred_element_type=result)
  y, pull = jax.vjp(lambda x, m: product(equation, x, m, result), x, matrix)
  expected, pull_expected = jax.vjp(derived, x, matrix)
  assert y.dtype == result
  assert jnp.array_equal(y, expected)
  gradient = jax.random.normal(keys[2], y.shape)
  for found, want in zip(pull(gradient), pull_expected(gradient), strict=True):
    assert found.dtype == want.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 2e-2  # of a rounding in bfloat16
    assert jnp.allclose(found, want, rtol=tolerance, atol=tolerance)
