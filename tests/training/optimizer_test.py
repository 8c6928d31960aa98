import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training.gpt_step import decay_mask
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)


def test_schedules():
  cosine = learning_rate(
    OptimizerConfig(1.0, "cosine", warmup_steps=10, final_lr=0.1), steps=110
  )
  assert cosine(0) == 0
  np.testing.assert_allclose(cosine(5), 0.5)
  np.testing.assert_allclose(cosine(10), 1.0)
  np.testing.assert_allclose(cosine(60), 0.55)
  np.testing.assert_allclose(cosine(110), 0.1)
  constant = learning_rate(OptimizerConfig(0.3, warmup_steps=10), steps=100)
  np.testing.assert_allclose(
    [constant(5), constant(10), constant(99)], [0.15, 0.3, 0.3]
  )


def test_a_step_is_adamw_after_clipping():
  config = OptimizerConfig(0.1, b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
  params = {"w": jnp.array([1.0, -2.0])}
  grads = {"w": jnp.array([3.0, 4.0])}  # norm 5
  optimizer = make_optimizer(config, learning_rate(config, steps=10))
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  g = np.array([0.6, 0.8])
  expected = -0.1 * (g / (np.abs(g) + 1e-8) + 0.05 * np.array([1.0, -2.0]))
  np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_decay_acts_on_matrices_and_embeddings_only():
  config = GPTConfig(2, 4, 32, grid=2, vocab_size=20, condition="caption",
                     caption_tokens=3, caption_dim=5)  # fmt: skip
  params = unbox(jax.eval_shape(lambda key: init_gpt(config, key), jax.random.key(0)))
  mask = decay_mask(params)
  assert mask["code_embedding"]
  assert mask["head"]
  assert mask["condition"] == {"in": True, "out": True, "unconditional": False}
  assert not mask["norm"]
  layers = mask["layers"]
  assert not layers["attention_norm"]
  assert not layers["ffn_norm"]
  assert layers["attention"] == {"qkv": True, "out": True}
  assert layers["ffn"] == {"in": True, "out": True}
