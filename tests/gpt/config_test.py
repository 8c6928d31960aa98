import functools

import jax
import pytest

from llamagen_jax import GPTConfig, UserError
from llamagen_jax.gpt.config import PRESETS
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from tests import parity


def count(config: GPTConfig) -> int:
  shapes = jax.eval_shape(functools.partial(init_gpt, config), jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(unbox(shapes)))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_equals_the_original(name):
  expected = parity.manifest()["models"][f"GPT-{name}"]
  config = GPTConfig.preset(name, image_size=256)
  assert config.ffn_dim == expected["ffn_hidden"]
  assert count(config) == expected["c2i_params"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("image_size", [256, 384, 512])
def test_every_caption_preset_takes_shape(name, image_size):
  config = GPTConfig.preset(name, image_size=image_size, condition="caption")
  assert config.length == 120 + (image_size // 16) ** 2 - 1
  captions = 120 * 2048 + 2048 * config.dim + config.dim**2  # buffer and perceptron
  classes = 1001 * config.dim
  c2i = parity.manifest()["models"][f"GPT-{name}"]["c2i_params"]
  assert count(config) == c2i - classes + captions


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: GPTConfig.preset("Q", image_size=256), ["'Q'", "XXL"]),
    (lambda: GPTConfig.preset("B", image_size=250), ["250", "16"]),
    (lambda: GPTConfig.preset("B", image_size=(256, 250)), ["250x256", "16"]),
    (lambda: GPTConfig(2, 4, 64, "2x4"), ["model.grid='2x4'", "(height, width)"]),
    (lambda: GPTConfig(2, 3, 64, 4), ["model.dim=64", "model.heads=3"]),
    (lambda: GPTConfig(2, 4, 64, 4, kv_heads=3), ["model.kv_heads=3"]),
    (lambda: GPTConfig(2, 4, 64, 4, remat="some"), ["model.remat='some'", "dots"]),
  ],
)
def test_bad_shapes_are_named(make, words):
  with pytest.raises(UserError) as error:
    make()
  assert all(word in str(error.value) for word in words)
