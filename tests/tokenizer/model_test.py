import functools

import jax
import numpy as np
import pytest

from llamagen_jax import TokenizerConfig, UserError, VQModel, weights
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.model import init_tokenizer
from tests import parity


@pytest.mark.parametrize("name, side", [("VQ-16", 64), ("VQ-8", 32)])
def test_published_tokenizers_equal_the_original(name, side):
  golden = parity.golden()
  config, params = weights.tokenizer_from_torch(parity.state_dict(name))
  assert config == TokenizerConfig.preset(name)
  images = np.tanh(parity.randn(f"{name}/image", (2, 3, side, side)))
  images = images.transpose(0, 2, 3, 1)

  @functools.partial(jax.jit, static_argnames="method")
  def apply(x, method):
    return VQModel(config).apply({"params": params}, x, method=method)

  latents = apply(images, "latents")
  np.testing.assert_allclose(latents, golden[f"{name}_latent"], atol=2e-4)
  codes = apply(images, "encode")
  np.testing.assert_array_equal(codes, golden[f"{name}_indices"])
  np.testing.assert_allclose(apply(codes, "decode"), golden[f"{name}_recon"], atol=2e-4)
  codes = parity.randint(f"{name}/codes", 16384, (2, 16)).reshape(2, 4, 4)
  expected = golden[f"{name}_decode_code"]
  np.testing.assert_allclose(apply(codes, "decode"), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_presets_take_shape(name):
  config = TokenizerConfig.preset(name)
  shapes = unbox(
    jax.eval_shape(functools.partial(init_tokenizer, config), jax.random.key(0))
  )
  expected = parity.manifest()["state_dicts"][name]
  found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert found == sum(int(np.prod(shape)) for shape in expected.values())


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: TokenizerConfig.preset("VQ-32"), ["'VQ-32'", "VQ-16"]),
    (lambda: TokenizerConfig((1, 2), width=20), ["model.norm_groups=32", "20"]),
    (lambda: TokenizerConfig((1,), codebook_size=2**17), ["131072", "65536"]),
  ],
)
def test_bad_shapes_are_named(make, words):
  with pytest.raises(UserError) as error:
    make()
  assert all(word in str(error.value) for word in words)


def test_enlarging_convolution_equals_enlarging_and_convolving():
  x_BHWC = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 7))
  axes = jax.lax.conv_dimension_numbers(
    x_BHWC.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")
  )
  large = x_BHWC.repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_allclose(
    model._enlarge_and_convolve(x_BHWC, kernel, dimension_numbers=axes),
    jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=axes),
    atol=1e-5,
  )
