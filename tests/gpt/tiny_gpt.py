"""Tiny transformers of classes and of captions, with inputs for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import GPT, GPTConfig
from llamagen_jax.gpt.cached import prefill_forward, step_forward
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from tests import parity

TINY = GPTConfig(2, 4, 32, grid=3, vocab_size=50, num_classes=7, ffn_multiple=16)
TINY_CAPTION = dataclasses.replace(
  TINY, condition="caption", caption_tokens=6, caption_dim=10
)


def random_params(config: GPTConfig, seed: int = 0):
  """Returns parameters none of which is trivial, head and norms included."""
  shapes = unbox(jax.eval_shape(lambda: init_gpt(config, jax.random.key(0))))
  rng = np.random.default_rng(seed)

  def normal(path, leaf):
    noise = 0.2 * rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(noise + path[-1].key.endswith("norm"))

  return jax.tree_util.tree_map_with_path(normal, shapes)


# Compiled, because every operation of its own would be a program to compile.
prefill = jax.jit(prefill_forward, static_argnums=0)
step = jax.jit(step_forward, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="patch")
def forward(config: GPTConfig, params, codes, condition, mask=None, drop=None, **other):
  """Returns the logits of the model."""
  return GPT(config).apply({"params": params}, codes, condition, mask, drop, **other)


def inputs(config: GPTConfig, batch: int = 3):
  codes = parity.randint("codes", config.vocab_size, (batch, config.image_tokens))
  if config.condition == "class":
    return codes, parity.randint("labels", config.num_classes, (batch,)), None
  width = config.caption_tokens
  mask = np.arange(width) >= width - np.array([1, 4, width])[:batch, None]
  features = parity.randn("caption", (batch, width, config.caption_dim))
  return codes, features * mask[..., None], mask
