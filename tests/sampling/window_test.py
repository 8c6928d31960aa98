"""Windows of codes: the codes of the plain loop, in fewer forwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPTConfig, SamplingConfig, UserError, generate
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.sampling import window
from llamagen_jax.sampling.decode import DecodeInputs, generate_codes
from llamagen_jax.sampling.keys import as_keys, image_keys
from llamagen_jax.sampling.window import WRONG, accept, chunk_masks
from tests.gpt.tiny_gpt import TINY, TINY_CAPTION, inputs, random_params

pytestmark = pytest.mark.exact

# As the digits' model: 64 codes of 128, and logits that are far from flat.
DIGITS = GPTConfig(
  2, 2, 32, grid=8, vocab_size=128, ffn_multiple=16, num_classes=10,
  prefix_rope="identity",
)  # fmt: skip
IMAGES = 200
SETTINGS = {
  "plain": SamplingConfig(),
  "guided": SamplingConfig(guidance_scale=3.0, guidance_start=5, guidance_stop=40),
  "filters": SamplingConfig(
    guidance_scale=4.0, guidance_schedule="power-cosine", top_k=20, top_p=0.9,
    temperature=1.2,
  ),
  "greedy": SamplingConfig(guidance_scale=2.0, guidance_schedule="linear", greedy=True),
}  # fmt: skip


def decode(config, params, condition, mask, sampling, seed=0):
  """Codes and forwards of a batch whose images have keys of their own."""
  batch = len(condition)
  keys = as_keys(image_keys(seed, range(batch)))
  arrays = DecodeInputs(params, keys, mask, sampling.for_batch(batch))
  return map(np.asarray, generate_codes(config, sampling, arrays, condition))


@pytest.mark.parametrize(
  "name, cache",
  [
    ("guided", "float"),
    ("filters", "float"),
    pytest.param("plain", "float", marks=pytest.mark.slow),
    pytest.param("greedy", "float", marks=pytest.mark.slow),
    pytest.param("filters", "int8", marks=pytest.mark.slow),
  ],
)
def test_200_images_have_the_codes_of_the_plain_loop(name, cache):
  config = dataclasses.replace(DIGITS, kv_cache=cache)
  params = decoding_params(config, random_params(config))
  labels = np.arange(IMAGES) % config.num_classes
  expected, one_by_one = decode(config, params, labels, None, SETTINGS[name])
  fast = dataclasses.replace(SETTINGS[name], window=8)
  codes, forwards = decode(config, params, labels, None, fast)
  np.testing.assert_array_equal(codes, expected)
  assert (one_by_one == DIGITS.image_tokens).all()
  assert (forwards >= DIGITS.image_tokens / 8).all()
  assert forwards.mean() < 0.95 * DIGITS.image_tokens


@pytest.mark.parametrize(
  "size, cache", [(2, "float"), (5, "float"), (20, "float"), (2, "int8")]
)
@pytest.mark.parametrize("negative", [False, True])
def test_captions_with_and_without_a_negative_prompt(size, cache, negative):
  """Also a window larger than the image, and a row whose caption is all padding."""
  config = dataclasses.replace(
    TINY_CAPTION, kv_heads=2, target_embedding=True, kv_cache=cache
  )
  params = decoding_params(config, random_params(config))
  _, features, mask = inputs(config)
  mask[1] = False
  if negative:
    features = np.stack([features, features[::-1]], axis=1)
    mask = np.stack([mask, mask[::-1]], axis=1)
  sampling = SamplingConfig(guidance_scale=2.5, top_p=0.95)
  expected, _ = decode(config, params, features, mask, sampling)
  fast = dataclasses.replace(sampling, window=size)
  codes, _ = decode(config, params, features, mask, fast)
  np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("seed", range(4))
def test_random_models_of_random_shapes(seed):
  rng = np.random.default_rng(seed)
  config = dataclasses.replace(
    TINY,
    grid=tuple(rng.integers(2, 5, 2).tolist()),
    kv_heads=int(rng.choice([0, 1, 2])),
    qk_norm=bool(rng.integers(2)),
    vocab_size=int(rng.integers(2, 40)),
  )
  params = random_params(config)
  sampling = SamplingConfig(
    guidance_scale=float(rng.choice([1.0, 2.0])), top_k=int(rng.integers(0, 9)),
    temperature=float(rng.uniform(0.5, 2)),
  )  # fmt: skip
  labels, key = rng.integers(config.num_classes, size=5), jax.random.key(seed)
  expected = generate(config, params, labels, key, sampling=sampling)
  fast = dataclasses.replace(sampling, window=int(rng.integers(2, 9)))
  codes = generate(config, params, labels, key, sampling=fast)
  np.testing.assert_array_equal(codes, expected)


def test_an_image_does_not_depend_on_its_neighbours():
  """Although these advance at another pace."""
  params = decoding_params(TINY, random_params(TINY))
  sampling = SamplingConfig(guidance_scale=2.0, window=4)
  labels = np.array([1, 5, 2, 6])
  keys = as_keys(image_keys(7, range(4)))
  together = generate(TINY, params, labels, keys, sampling=sampling)
  rows = np.array([3, 1])
  apart = generate(TINY, params, labels[rows], keys[rows], sampling=sampling)
  np.testing.assert_array_equal(apart, together[rows])


@pytest.mark.slow
def test_rounding_in_bfloat16_is_the_only_difference(capsys):
  """A window rounds otherwise: now and then another code wins, and the rest follows."""
  config = dataclasses.replace(DIGITS, dtype="bfloat16")
  params = decoding_params(config, random_params(config))
  labels = np.arange(IMAGES) % config.num_classes
  sampling = SamplingConfig(guidance_scale=3.0, top_p=0.9)
  expected, _ = decode(config, params, labels, None, sampling)
  fast = dataclasses.replace(sampling, window=8)
  codes, _ = decode(config, params, labels, None, fast)
  same = codes == expected
  alike = np.cumprod(same, axis=1).sum(axis=1)  # codes before the first that differs
  ties = np.mean(~same.all(axis=1)) * IMAGES / alike.sum()
  with capsys.disabled():
    print(f"\nbfloat16, window 8: {ties:.2%} of codes differ where all before agree")
  assert ties < 0.05


def test_masks_are_those_of_the_diagram():
  start = np.array([5], np.int32)
  own = np.array([[8, 9, 10]], np.int32)
  position = np.array([[5, 6, WRONG, 7, WRONG, WRONG, 8, 9, 10]], np.int32)
  cache, recent = chunk_masks(None, start, own, position, 12)
  np.testing.assert_array_equal(cache, np.arange(12)[None, None] < 5)
  drawn = ["##.#..#..", "##.#..##.", "##.#..###"]
  np.testing.assert_array_equal(recent[0], [[c == "#" for c in row] for row in drawn])


def test_masks_hide_the_padding_of_a_caption_from_all_but_itself():
  padding = np.array([[False, True, True], [False, False, False]])
  start, own = np.array([2, 2], np.int32), np.array([[2, 3], [2, 3]], np.int32)
  cache, recent = chunk_masks(padding, start, own, own, 6)
  np.testing.assert_array_equal(cache[0, 0], [False, True, False, False, False, False])
  assert not cache[1].any()
  np.testing.assert_array_equal(recent[0], [[True, False], [True, True]])
  np.testing.assert_array_equal(recent[1], [[True, False], [False, True]])


@pytest.mark.parametrize(
  "count, guesses, final",
  [(0, [4, 5], 3), (0, [4, 0], 2), (0, [0, 5], 1), (8, [4, 5], 1), (9, [4, 5], 0)],
)
def test_codes_are_final_while_the_guesses_before_them_were_right(
  count, guesses, final
):
  state = window.init_state(TINY, 1, window=3, forwards=1)
  codes = state.codes.at[0, count + 1 : count + 3].set(jnp.array(guesses))
  state = state._replace(codes=codes, count=jnp.array([count]))
  new, accepted = accept(TINY, state, jnp.array([[4, 5, 6]]))
  assert accepted[0] == final and new.count[0] == count + final
  assert new.forwards[0] == (final > 0)
  if final:
    np.testing.assert_array_equal(
      new.codes[0, count + 1 : count + 7], [4, 5, 6, 6, 6, 6]
    )
  else:  # a finished image stays as it is
    np.testing.assert_array_equal(new.codes, state.codes)


@pytest.mark.parametrize("size", [0, -1, 3 * 10**9])
def test_a_window_of_no_size_is_refused(size):
  with pytest.raises(UserError, match=f"window={size}: expected 1 or more"):
    SamplingConfig(window=size)
