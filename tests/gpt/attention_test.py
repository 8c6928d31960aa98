"""The kinds of attention agree, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.gpt.attention import (
  attention_weights,
  cudnn_attention,
  mix,
  splash_attention,
)
from llamagen_jax.gpt.conditioning import attention_mask, visible_tokens
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import make_mesh, unbox
from tests import tiny
from tests.gpt.tiny_gpt import forward

B, T, K, G, H = 2, 20, 2, 3, 16


def qkv(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H))
  return [
    jax.random.normal(*pair).astype(dtype) for pair in zip(keys, shapes, strict=True)
  ]


def plain(q, k, v, mask):
  return mix(attention_weights(q, k, mask).astype(v.dtype), v)


def causal():
  return jnp.tril(jnp.ones((1, T, T), bool))


def test_attention_is_the_textbooks():
  q, k, v = map(np.asarray, qkv())
  found = plain(q, k, v, causal())
  for b, head, g, t in [(0, 0, 0, 0), (1, 1, 2, 19), (0, 1, 1, 7)]:
    scores = k[b, : t + 1, head] @ q[b, t, head, g] / H**0.5
    weights = np.exp(scores - scores.max())
    expected = weights / weights.sum() @ v[b, : t + 1, head]
    np.testing.assert_allclose(found[b, t, head, g], expected, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_kernel_is_attention(dtype, atol):
  q, k, v = qkv(dtype)
  expected, found = plain(q, k, v, causal()), splash_attention(q, k, v)
  assert found.dtype == dtype and found.shape == q.shape
  np.testing.assert_allclose(
    found.astype(np.float32), expected.astype(np.float32), atol=atol
  )


def test_its_gradients_too():
  target = jax.random.normal(jax.random.key(9), (B, T, K, G, H))
  loss = [
    lambda q, k, v: jnp.sum(target * plain(q, k, v, causal())),
    lambda q, k, v: jnp.sum(target * splash_attention(q, k, v)),
  ]
  expected, found = (jax.grad(f, argnums=(0, 1, 2))(*qkv()) for f in loss)
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_padding_of_captions_is_hidden():
  config = dataclasses.replace(tiny.GPT, condition="caption", caption_tokens=12)
  assert config.length == T
  caption_mask = jnp.array([[0] * 5 + [1] * 7, [1] * 12])
  q, k, v = qkv()
  expected = plain(q, k, v, attention_mask(config, caption_mask, jnp.arange(T)))
  visible = visible_tokens(config, caption_mask, T)
  found = splash_attention(q, k, v, visible)
  np.testing.assert_allclose(found[visible], expected[visible], atol=1e-5)


def test_a_model_with_either():
  config = dataclasses.replace(tiny.GPT, kv_heads=2)
  params = unbox(init_gpt(config, jax.random.key(0)))
  codes = jax.random.randint(jax.random.key(1), (2, config.image_tokens), 0, 50)

  def logits(attention):
    model = dataclasses.replace(config, attention=attention)
    return forward(model, params, codes, jnp.array([1, 3]))

  with jax.set_mesh(make_mesh(tensor=1)):
    on_mesh = logits("splash")
  np.testing.assert_allclose(logits("xla"), logits("splash"), atol=1e-5)
  np.testing.assert_allclose(logits("xla"), on_mesh, atol=1e-5)


def cudnn_or_its_stand_in() -> str:
  """Where there is no GPU, the same call by XLA shows the padding and the masks."""
  return "cudnn" if jax.default_backend() == "gpu" else "xla"


@pytest.mark.parametrize("head_dim", [16, 100])
@pytest.mark.parametrize("length", [20, 21])
@pytest.mark.parametrize("hidden", [0, 5])
def test_cudnn_s_padding_changes_nothing(head_dim, length, hidden):
  config = dataclasses.replace(tiny.GPT, condition="caption", caption_tokens=12)
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (
    (B, length, K, G, head_dim), (B, length, K, head_dim), (B, length, K, head_dim),
  )  # fmt: skip
  q, k, v = (
    jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True)
  )
  caption_mask = jnp.array([[0] * hidden + [1] * (12 - hidden), [1] * 12])
  mask = attention_mask(config, caption_mask, jnp.arange(length), length)
  visible = visible_tokens(config, caption_mask, length) if hidden else None
  rows = jnp.ones((B, length), bool) if visible is None else visible
  target = jax.random.normal(jax.random.key(9), q.shape) * rows[..., None, None, None]

  def loss(attend):
    return lambda q, k, v: jnp.sum(target * attend(q, k, v))

  def by_cudnn(q, k, v):
    return cudnn_attention(q, k, v, visible, cudnn_or_its_stand_in())

  def by_xla(q, k, v):
    return plain(q, k, v, mask)

  found, expected = (f(q, k, v).astype(np.float32) for f in (by_cudnn, by_xla))
  assert found.shape == q.shape
  np.testing.assert_allclose(found[rows], expected[rows], atol=2e-2)
  gradients = (
    jax.grad(loss(f), argnums=(0, 1, 2))(q, k, v) for f in (by_cudnn, by_xla)
  )
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), atol=6e-2, rtol=2e-2
    )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_have_no_dropout(kernel):
  with pytest.raises(UserError, match=f"'{kernel}' has no model.attention_dropout"):
    dataclasses.replace(
      tiny.GPT, attention=kernel, attention_dropout=0.1, dtype="bfloat16"
    )


@pytest.mark.parametrize(
  "backend, dtype, dropout, expected",
  [
    ("tpu", "float32", 0.0, "splash"), ("tpu", "bfloat16", 0.1, "xla"),
    ("gpu", "bfloat16", 0.0, "cudnn"), ("gpu", "float32", 0.0, "xla"),
    ("cpu", "bfloat16", 0.0, "xla"),
  ],
)  # fmt: skip
def test_auto_is_the_backend_s_kernel_where_it_fits(backend, dtype, dropout, expected):
  config = dataclasses.replace(
    tiny.GPT, attention="auto", dtype=dtype, attention_dropout=dropout
  )
  assert config.for_backend(backend).attention == expected


def test_the_kernel_of_another_backend_is_refused():
  config = dataclasses.replace(tiny.GPT, attention="splash")
  assert config.for_backend("tpu") is config
  with pytest.raises(UserError, match="'splash' does not run on gpu: expected auto or"):
    config.for_backend("gpu")
  with pytest.raises(UserError, match=r"'cudnn' needs model.dtype='bfloat16'"):
    dataclasses.replace(tiny.GPT, attention="cudnn")
