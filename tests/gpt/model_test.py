import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPT, GPTConfig, weights
from llamagen_jax.gpt.cache import LayerCache, init_cache, write_cache
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.cached_attention import attend_before_write, attend_parts
from llamagen_jax.gpt.conditioning import attention_mask, embed_condition
from llamagen_jax.gpt.model import embed_codes, init_gpt
from llamagen_jax.gpt.objective import cross_entropy
from llamagen_jax.parallel.mesh import unbox
from tests import parity
from tests.gpt.tiny_gpt import (
  TINY,
  TINY_CAPTION,
  forward,
  inputs,
  prefill,
  random_params,
  step,
)


@pytest.mark.parametrize("name, out", [("c2i", "c2i"), ("gqa", "gqa")])
def test_class_logits_equal_the_original(name, out):
  golden = parity.golden()
  config, params = weights.gpt_from_torch(
    parity.state_dict(f"gpt_tiny_{name}"), num_heads=4, image_tokens=16
  )
  logits = forward(config, params, golden["c2i_codes"], golden["c2i_labels"])
  np.testing.assert_allclose(logits, golden[f"{out}_logits"], atol=2e-4)
  if name == "c2i":
    loss = jnp.mean(cross_entropy(logits, golden["c2i_codes"]))
    np.testing.assert_allclose(loss, golden["c2i_loss"], rtol=1e-6)


def test_caption_logits_equal_the_original():
  golden = parity.golden()
  config, params = weights.gpt_from_torch(
    parity.state_dict("gpt_tiny_t2i"), num_heads=4, image_tokens=16
  )
  logits = forward(
    config, params, golden["c2i_codes"], golden["t2i_caption"], golden["t2i_mask"]
  )
  np.testing.assert_allclose(logits, golden["t2i_logits"], atol=2e-4)


def test_base_model_equals_the_original():
  golden = parity.golden()
  state_dict = parity.state_dict("GPT-B_256_c2i")
  config, params = weights.gpt_from_torch(state_dict, image_tokens=256)
  assert config == GPTConfig.preset("B", image_size=256)
  codes = parity.randint("gptb/codes", 16384, (1, 256))
  labels = parity.randint("gptb/labels", 1000, (1,))
  logits = forward(config, params, codes, labels)
  np.testing.assert_allclose(
    logits[:, ::16, ::512], golden["gptb_logits_slice"], atol=2e-4
  )
  loss = jnp.mean(cross_entropy(logits, codes))
  np.testing.assert_allclose(loss, golden["gptb_loss"], rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_CAPTION], ids=["class", "caption"])
def test_causality_by_gradient(config):
  """Logits at t depend on the codes before t, all of them, and on no other."""
  params = random_params(config)
  codes, condition, mask = inputs(config, batch=1)
  table = params["code_embedding"]
  # Give every position an embedding row of its own, to differentiate by.
  own = jnp.arange(config.image_tokens)[None]
  rows = embed_codes(table, codes, "float32")[0]

  @jax.jit
  @jax.grad
  def gradient(rows, t):
    changed = params | {"code_embedding": table.at[: len(rows)].set(rows)}
    return forward(config, changed, own, condition, mask)[0, t].sum()

  for t in range(config.image_tokens):
    influence = jnp.abs(gradient(rows, t)).sum(axis=1)
    assert (influence[:t] > 0).all()
    assert (influence[t:] == 0).all()


@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize(
  "config",
  [
    TINY,
    TINY_CAPTION,
    dataclasses.replace(TINY, qk_norm=True),
    dataclasses.replace(TINY, target_embedding=True),
    dataclasses.replace(TINY_CAPTION, target_embedding=True),
  ],
  ids=["class", "caption", "qk_norm", "target", "caption_target"],
)
def test_cached_decoding_equals_the_full_forward(config, kv_heads):
  config = dataclasses.replace(config, kv_heads=kv_heads)
  params = random_params(config)
  codes, condition, condition_mask = inputs(config)
  batch = len(codes)
  # Conditional and unconditional rows, as guidance runs them.
  drop = jnp.arange(batch) == 1
  full = forward(config, params, codes, condition, condition_mask, drop)

  flat = decoding_params(config, params)
  prefix = embed_condition(config).apply(
    {"params": params["condition"]}, condition, drop
  )
  cache = init_cache(config, batch, config.length)
  mask = attention_mask(config, condition_mask, jnp.arange(config.prefix_tokens))
  logits, cache = prefill(config, flat, prefix, cache, mask)
  np.testing.assert_allclose(logits, full[:, 0], atol=1e-5)
  for t in range(1, config.image_tokens):
    position = config.prefix_tokens + t - 1
    x = embed_codes(params["code_embedding"], codes[:, t - 1 : t], config.dtype)
    mask = attention_mask(config, condition_mask, jnp.array([position]))
    logits, cache = step(config, flat, x, cache, position, mask)
    np.testing.assert_allclose(logits, full[:, t], atol=1e-5)


def test_attention_before_the_write_equals_attention_after_it():
  """The order of a TPU against the order of other machines."""
  rng = np.random.default_rng(0)
  B, K, G, H, S, position = 3, 2, 2, 8, 7, 4

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  q_B1KGH = normal(B, 1, K, G, H)
  cache = LayerCache(normal(B, K, H, S), normal(B, K, H, S))
  token = LayerCache(normal(B, K, H, 1), normal(B, K, H, 1))
  mask_B1S = (np.arange(S) <= position) & (np.arange(S) != [[[0]], [[1]], [[6]]])
  written = write_cache(cache, token, position)
  after = attend_parts(q_B1KGH, [(written, mask_B1S)])
  before = attend_before_write(q_B1KGH, cache, token, position, mask_B1S)
  np.testing.assert_allclose(before, after, atol=1e-6)
  stale = attend_parts(q_B1KGH, [(cache, mask_B1S)])
  assert np.abs(stale - after).max() > 1e-2


def test_padding_of_captions_changes_nothing():
  config, params = TINY_CAPTION, random_params(TINY_CAPTION)
  codes, features, mask = inputs(config)
  logits = forward(config, params, codes, features, mask)
  noise = jnp.where(mask[..., None], features, 100.0)
  noisy = forward(config, params, codes, noise, mask)
  np.testing.assert_allclose(noisy, logits, atol=1e-5)


def test_unconditional_buffer_gets_no_gradient():
  params = random_params(TINY_CAPTION)
  codes, features, mask = inputs(TINY_CAPTION)
  drop = jnp.ones(len(codes), bool)

  def loss(params):
    logits = forward(TINY_CAPTION, params, codes, features, mask, drop)
    return jnp.mean(cross_entropy(logits, codes))

  grads = jax.jit(jax.grad(loss))(params)["condition"]
  assert (grads["unconditional"] == 0).all()
  assert (grads["in"] != 0).any()


def test_first_loss_is_the_entropy_of_the_vocabulary():
  params = unbox(init_gpt(TINY, jax.random.key(0)))
  codes, labels, _ = inputs(TINY)
  logits = forward(TINY, params, codes, labels)
  np.testing.assert_allclose(
    jnp.mean(cross_entropy(logits, codes)), np.log(50), rtol=1e-6
  )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
  """With dropout and stochastic depth on, so that random numbers are redrawn alike."""
  config = dataclasses.replace(TINY, drop_path=0.3)
  params = random_params(config)
  codes, labels, _ = inputs(config)

  def grads(config):
    def loss(params):
      model = GPT(config, training=True)
      rngs = {"dropout": jax.random.key(3)}
      logits = model.apply({"params": params}, codes, labels, rngs=rngs)
      return jnp.mean(cross_entropy(logits, codes))

    return jax.jit(jax.grad(loss))(params)

  plain, remat = grads(config), grads(dataclasses.replace(config, remat=remat))
  assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, remat)
