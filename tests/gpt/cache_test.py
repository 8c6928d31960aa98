"""Caches of keys and values: 8 bits beside floating point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.gpt.cache import (
  LayerCache,
  SplitCache,
  as_cache,
  as_code_cache,
  cache_length,
  init_cache,
  init_chunk_cache,
  resize_cache,
  write_cache,
  write_chunk,
  write_code,
  write_condition,
)
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.cached_attention import (
  attend_before_write,
  attend_parts,
  cache_parts,
)
from llamagen_jax.gpt.conditioning import attention_mask, embed_prefix
from llamagen_jax.gpt.model import embed_codes
from tests.gpt.tiny_gpt import (
  TINY,
  TINY_CAPTION,
  forward,
  inputs,
  prefill,
  random_params,
  step,
)

INT8 = dataclasses.replace(TINY_CAPTION, kv_heads=2, kv_cache="int8")


def normal(*shape, seed=0, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def as_floats(cache: LayerCache) -> LayerCache:
  """Multiplies whole numbers with their scales."""
  keys = cache.keys.astype(jnp.float32) * cache.key_scale[:, :, None]
  values = cache.values.astype(jnp.float32) * cache.value_scale[:, :, None]
  return LayerCache(keys, values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_errs_by_half_a_step_of_the_token_and_head(dtype, seed):
  """Whatever the sizes of other tokens and heads; zeros stay zeros."""
  rng, (B, T, K, H) = np.random.default_rng(seed), (2, 5, 3, 8)
  size = 10 ** rng.uniform(-6, 4, (2, B, T, K, 1))
  size[:, 0, 2, 1] = 0
  exact = jnp.asarray(size * rng.standard_normal((2, B, T, K, H)), dtype)
  config = dataclasses.replace(INT8, dtype=dtype)
  rounded = as_code_cache(config, *exact)
  assert rounded.key_scale.dtype == rounded.keys.dtype == dtype
  stored = [x.astype(jnp.int8) for x in (rounded.keys, rounded.values)]
  np.testing.assert_array_equal(stored[0], rounded.keys)  # whole numbers of 8 bits
  np.testing.assert_array_equal(stored[1], rounded.values)
  for whole, scale, x in zip(stored, rounded[2:], as_cache(*exact)[:2], strict=True):
    step = np.asarray(scale, np.float32)[:, :, None]
    error = np.abs(np.asarray(whole, np.float32) * step - np.asarray(x, np.float32))
    assert (error <= step * (0.5 + 1e-4)).all()
    assert (np.abs(whole).max(axis=2) >= 126).sum() == B * T * K - 1


def test_condition_tokens_stay_as_they_are():
  k_BTKH, v_BTKH = normal(2, 4, 2, 8), normal(2, 4, 2, 8, seed=1)
  is_condition = np.arange(4)[None] < np.array([[1], [3]])
  found = as_floats(as_code_cache(INT8, k_BTKH, v_BTKH, is_condition))
  exact = as_cache(k_BTKH, v_BTKH)
  for x, y in ((found.keys, exact.keys), (found.values, exact.values)):
    same = (x == y).all(axis=(1, 2))
    np.testing.assert_array_equal(same, is_condition)


def test_a_cache_of_8_bits_has_the_positions_of_one_in_floating_point():
  c = dataclasses.replace(INT8, dtype="bfloat16", caption_tokens=6)
  P, length = c.prefix_tokens, c.length
  cache = init_cache(c, 3, length)
  assert len(cache) == c.layers and cache_length(cache) == length
  prefix, codes = cache[0]
  assert prefix.keys.shape == (3, 2, c.head_dim, P)
  assert prefix.keys.dtype == prefix.values.dtype == c.dtype
  assert codes.keys.shape == (3, 2, c.head_dim, length - P + 1)
  assert codes.keys.dtype == codes.values.dtype == "int8"
  assert codes.key_scale.shape == codes.value_scale.shape == codes.keys[:, :, 0].shape
  for more in (5, -2):
    resized = resize_cache(cache, length + more)
    assert cache_length(resized) == length + more
    assert jax.tree.map(jnp.shape, resized[0].prefix) == jax.tree.map(jnp.shape, prefix)


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_a_cache_that_grows_or_shrinks_keeps_what_it_has_room_for(kv_cache):
  c = dataclasses.replace(INT8, kv_cache=kv_cache)
  cache = jax.tree.map(lambda x: x + 1, init_cache(c, 2, c.length))
  shorter = resize_cache(cache, c.length - 3)
  again = resize_cache(shorter, c.length)
  for x, y in zip(*map(jax.tree.leaves, (cache, again)), strict=True):
    kept = (y != 0).sum(axis=-1)
    assert x.shape == y.shape and (y[y != 0] == 1).all()
    assert (kept == x.shape[-1] - (3 if x.shape[-1] > c.prefix_tokens else 0)).all()


def written(parts) -> SplitCache:
  """Returns a cache whose entries were written as decoding does."""
  (k_BPKH, v_BPKH), (k_BTKH, v_BTKH) = parts
  P, T = k_BPKH.shape[1], k_BTKH.shape[1]
  [cache, _] = init_cache(INT8, len(k_BPKH), P + T)
  cache = write_condition(cache, as_cache(k_BPKH, v_BPKH))
  for t in range(T):
    code = as_code_cache(INT8, k_BTKH[:, t : t + 1], v_BTKH[:, t : t + 1])
    cache = write_code(cache, code, jnp.int32(P + t))
  return cache


def test_attention_is_that_over_the_rounded_cache():
  """Also to several tokens, to a token before it is written, and with padding."""
  B, K, G, H, P, T = 3, 2, 2, 8, 6, 5
  shapes = ((B, P, K, H), (B, T, K, H))
  parts = [
    [normal(*s, seed=10 * i + j) for j in range(2)] for i, s in enumerate(shapes)
  ]
  cache = written(parts)
  codes = as_floats(cache.codes)
  whole = jax.tree.map(
    lambda x, y: jnp.concatenate([x, y[..., 1:]], axis=-1), cache.prefix[:2], codes[:2]
  )
  last = P + T - 1
  mask_BTS = np.arange(P + T) <= np.array([[[last - 1], [last]]])
  mask_BTS = mask_BTS & (np.arange(P + T) != np.arange(B)[:, None, None])
  for tokens in (1, 2):
    q, mask = normal(B, tokens, K, G, H, seed=5), mask_BTS[:, -tokens:]
    expected = attend_parts(q, [(LayerCache(*whole), mask)])
    found = attend_parts(q, cache_parts(cache, mask))
    np.testing.assert_allclose(found, expected, atol=2e-6)
  q, mask = normal(B, 1, K, G, H, seed=6), mask_BTS[:, -1:]
  k, v = (normal(B, 1, K, H, seed=s) for s in (7, 8))
  token = as_code_cache(INT8, k, v)
  before = attend_before_write(q, cache, token, jnp.int32(last), mask)
  after = attend_parts(q, cache_parts(write_code(cache, token, jnp.int32(last)), mask))
  np.testing.assert_allclose(before, after, atol=2e-6)
  assert np.abs(attend_parts(q, cache_parts(cache, mask)) - after).max() > 1e-2


def test_a_chunk_goes_where_its_rows_are():
  """Also a chunk whose first token is the last one of the condition."""
  B, K, H, P, T = 2, 2, 8, 6, 5
  parts = [
    [normal(B, n, K, H, seed=10 * i + j) for j in range(2)]
    for i, n in enumerate((P, T))
  ]
  expected = written(parts)
  (prefix_k, prefix_v), (code_k, code_v) = parts
  [cache, _] = init_cache(INT8, B, P + T + 3)
  cache = write_condition(cache, as_cache(prefix_k[:, :-1], prefix_v[:, :-1]))
  every_k = jnp.concatenate([prefix_k, code_k], axis=1)
  every_v = jnp.concatenate([prefix_v, code_v], axis=1)
  start = jnp.full(B, P - 1)
  for size in (3, 3):
    at = start[0] + jnp.arange(size)
    chunk = init_chunk_cache(INT8, B, size)[0]
    entries = as_code_cache(INT8, every_k[:, at], every_v[:, at], (at < P)[None])
    cache = write_chunk(cache, write_cache(chunk, entries, 0), start)
    start += size
  for x, y in zip(cache.prefix[:2], expected.prefix[:2], strict=True):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(cache.codes, expected.codes, strict=True):
    np.testing.assert_array_equal(x[..., 1 : T + 1], y[..., 1 : T + 1])


@pytest.mark.parametrize("config", [TINY, TINY_CAPTION], ids=["class", "caption"])
def test_logits_are_near_those_of_the_whole_forward(config):
  """Standard deviations of errors, in those of the logits.

  Keys and values err by 1 / 254 of their token's largest at most, and both layers read
  them: 0.0079 and 0.0081 were measured.
  """
  config = dataclasses.replace(config, kv_heads=2, kv_cache="int8")
  params = random_params(config)
  codes, condition, condition_mask = inputs(config)
  drop = jnp.arange(len(codes)) == 1
  full = forward(config, params, codes, condition, condition_mask, drop)
  flat, P = decoding_params(config, params), config.prefix_tokens
  x = embed_prefix(config, params, condition, drop)
  mask = attention_mask(config, condition_mask, jnp.arange(P))
  cache = init_cache(config, len(codes), config.length)
  logits, cache = prefill(config, flat, x, cache, mask)
  np.testing.assert_allclose(logits, full[:, 0], atol=1e-5)  # no code is read yet
  errors = []
  for t in range(1, config.image_tokens):
    position = jnp.int32(P + t - 1)
    x = embed_codes(params["code_embedding"], codes[:, t - 1 : t], config.dtype)
    mask = attention_mask(config, condition_mask, position[None])
    logits, cache = step(config, flat, x, cache, position, mask)
    errors.append(logits - full[:, t])
  assert 1e-4 < np.std(errors) / np.std(full) < 0.01


def test_an_unknown_cache_is_refused():
  with pytest.raises(
    UserError, match="model.kv_cache='int4': expected one of float, int8"
  ):
    dataclasses.replace(TINY, kv_cache="int4")
