"""Tiny transformers of classes and of captions, with inputs for them."""

import dataclasses

import jax
import numpy as np

from llamagen_jax import GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from tests import parity

TINY = GPTConfig(2, 4, 32, grid=3, vocab_size=50, num_classes=7, ffn_multiple=16)
TINY_CAPTION = dataclasses.replace(
  TINY, condition="caption", caption_tokens=6, caption_dim=10
)


def random_params(config: GPTConfig):
  """Parameters with a head and norms that are not trivial."""
  params = unbox(init_gpt(config, jax.random.key(0)))
  keys = iter(jax.random.split(jax.random.key(1), 100))
  return jax.tree.map(
    lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params
  )


def inputs(config: GPTConfig, batch: int = 3):
  codes = parity.randint("codes", config.vocab_size, (batch, config.image_tokens))
  if config.condition == "class":
    return codes, parity.randint("labels", config.num_classes, (batch,)), None
  width = config.caption_tokens
  mask = np.arange(width) >= width - np.array([1, 4, width])[:batch, None]
  features = parity.randn("caption", (batch, width, config.caption_dim))
  return codes, features * mask[..., None], mask
