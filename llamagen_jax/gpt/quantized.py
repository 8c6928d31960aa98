"""Weights of 8 bits for decoding, whose time is the time to read them.

Symmetric, one scale an output channel. Activations stay as they are: the condition
tokens of image models have extreme values, and quantising them as well is known to
ruin the images (arXiv 2601.21238). The scale is applied after the product, so that no
copy of a matrix in floating point is ever needed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127
MATRICES = ("qkv_MD", "out_DN", "in_2FD", "out_DF")  # of a layer


class Int8Matrix(NamedTuple):
  """A matrix [.., out, in] as integers times a scale an output channel."""

  values: jax.Array  # int8 [.., out, in]
  scale: jax.Array  # [.., out], float32 or as asked for


Matrix = jax.Array | Int8Matrix


def quantize(matrix: jax.Array, scale_dtype: jnp.dtype = jnp.float32) -> Int8Matrix:
  """Rounds a matrix to 8 bits; an output channel of zeros stays zero."""
  matrix = matrix.astype(jnp.float32)
  scale = (jnp.max(jnp.abs(matrix), axis=-1) / LARGEST).astype(scale_dtype)
  divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
  return Int8Matrix(jnp.rint(matrix / divisor).astype(jnp.int8), scale)


def quantize_params(params: dict[str, Any]) -> dict[str, Any]:
  """Returns `decoding_params` with the layers' matrices and the head in 8 bits.

  Norms, the embedding of codes, of which a step reads a few rows, and the embedder of
  conditions stay as they are.
  """
  layers = tuple(
    layer | {name: quantize(layer[name]) for name in MATRICES}
    for layer in params["layers"]
  )
  return params | {"layers": layers, "head": quantize(params["head"])}


def matmul(
  equation: str, matrix: Matrix, x: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Multiplies a matrix of either kind with activations by an einsum.

  Args:
    equation: of `matrix` and `x`; the result starts with the matrix's output axes.
    matrix: [.., out, in].
    x: activations.
    dtype: of the result; None = that of the activations.
  """
  if not isinstance(matrix, Int8Matrix):
    return jnp.einsum(equation, matrix, x, preferred_element_type=dtype)
  values = matrix.values.astype(x.dtype)
  product = jnp.einsum(equation, values, x, preferred_element_type=jnp.float32)
  scale = matrix.scale.reshape(*matrix.scale.shape, *(1,) * (x.ndim - 1))
  return (product * scale).astype(dtype or x.dtype)
