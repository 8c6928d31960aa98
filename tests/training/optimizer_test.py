import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPTConfig
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training import gpt_step, tokenizer_step
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


def muon_updates(params, matrix_axes):
  """A first update of random gradients, without decay, for a learning rate of 1."""
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
  config = OptimizerConfig(1.0, kind="muon", clip=1e9)
  optimizer = make_optimizer(config, lambda step: 1.0, matrix_axes)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  return grads, updates


def test_muon_makes_every_matrix_of_a_layer_nearly_orthogonal():
  config = GPTConfig(2, 4, 32, grid=2, vocab_size=20, kv_heads=2)
  params = unbox(init_gpt(config, jax.random.key(0)))
  grads, updates = muon_updates(params, gpt_step.matrix_axes)
  layers = updates["layers"]
  D, K, E, H, F = 32, 2, 4, 8, config.ffn_dim  # E queries, a key and a value
  qkv, out = layers["attention"]["qkv"], layers["attention"]["out"]
  matrices = [
    *qkv.transpose(0, 3, 1, 2, 4).reshape(2 * E, D, K * H),
    *out.reshape(2, D, D),
    *layers["ffn"]["in"].swapaxes(1, 2).reshape(4, D, F),
    *layers["ffn"]["out"],
  ]
  for matrix in matrices:
    values = np.linalg.svd(matrix, compute_uv=False)
    scale = 0.2 * max(matrix.shape) ** 0.5
    assert (values > 0.3 * scale).all() and (values < 1.3 * scale).all()
  for name in ("code_embedding", "head", "norm"):  # a first step of Adam
    np.testing.assert_allclose(updates[name], -np.sign(grads[name]), rtol=1e-4)


def test_muon_of_a_tokenizer_is_for_convolutions():
  params = {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8))}, "codebook": jnp.ones((9, 4))}
  grads, updates = muon_updates(params, tokenizer_step.matrix_axes)
  kernel = updates["conv_in"]["kernel"]
  values = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)
  scale = 0.2 * kernel[..., 0].size ** 0.5
  assert (values > 0.3 * scale).all() and (values < 1.3 * scale).all()
  np.testing.assert_allclose(
    updates["codebook"], -np.sign(grads["codebook"]), rtol=1e-4
  )


def test_kinds():
  with pytest.raises(
    UserError, match="optimizer.kind='lion': expected one of adamw, muon"
  ):
    OptimizerConfig(1.0, kind="lion")
