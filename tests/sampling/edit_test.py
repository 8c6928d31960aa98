"""Images edited by their codes: what is kept, what is drawn, what is refused."""

import dataclasses

import numpy as np
import pytest

from llamagen_jax import UserError, edit, sample
from llamagen_jax.images import to_uint8
from llamagen_jax.sampling.edit import (
  Borders,
  Canvas,
  EditSettings,
  redrawn_cells,
  tiles,
)
from tests.sampling import fid_batch_test

saved = fid_batch_test.saved
SIDE = fid_batch_test.SIDE
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def models(saved):
  return fid_batch_test.load(saved, None)


def reconstruction(tokenizer, image):
  return np.asarray(to_uint8(tokenizer.decode(tokenizer.encode(image[None]))))[0]


@pytest.mark.exact
def test_all_hidden_is_a_sample(models):
  edited = edit(*models, IMAGE, classes=[1, 2, 3], seed=3, guidance_scale=2.0)
  sampled = sample(*models, [1, 2, 3], seed=3, guidance_scale=2.0)
  np.testing.assert_array_equal(edited, sampled)


def test_a_model_of_several_sizes_draws_that_of_the_image(models):
  gpt, tokenizer = models
  config = dataclasses.replace(gpt.config, other_grids=((2, 4),))
  both = dataclasses.replace(gpt, config=config)
  edited = edit(both, tokenizer, IMAGE[:4].repeat(2, 1)[:, :8], classes=[1], seed=3)
  for size in ((4, 8), [4, 8]):
    sampled = sample(both, tokenizer, [1], image_size=size, seed=3)
    np.testing.assert_array_equal(edited, sampled)
  square = sample(both, tokenizer, [1], image_size=(SIDE, SIDE), seed=3)
  np.testing.assert_array_equal(square, sample(gpt, tokenizer, [1], seed=3))
  with pytest.raises(UserError, match="image_size=0: expected a side"):
    sample(both, tokenizer, [1], image_size=0)


@pytest.mark.exact
def test_strength_0_is_the_reconstruction(models):
  edited = edit(*models, IMAGE, classes=[1], settings=EditSettings(strength=0))
  np.testing.assert_array_equal(edited[0], reconstruction(models[1], IMAGE))


def test_pixels_outside_of_the_mask_are_the_image_s_own(models):
  mask = np.zeros((SIDE, SIDE), bool)
  mask[3:] = True
  images = edit(*models, IMAGE, mask, classes=[0, 1, 0], guidance_scale=2.0)
  assert images.shape == (3, SIDE, SIDE, 3)
  for image in images:
    np.testing.assert_array_equal(image[:3], IMAGE[:3])
  assert (images[0] != images[2]).any()  # the same class, another key


def test_what_a_mask_hides_changes_nothing(models):
  mask = np.zeros((SIDE, SIDE), bool)
  mask[:2] = True
  other = np.where(mask[..., None], 255 - IMAGE, IMAGE)
  np.testing.assert_array_equal(
    edit(*models, IMAGE, mask, [1, 2]), edit(*models, other, mask, [1, 2])
  )


def test_outpainting_puts_the_image_into_a_larger_one(models):
  borders = Borders(left=4, bottom=2)
  images = edit(*models, IMAGE, classes=[1], outpaint=borders, seed=5)
  assert images.shape == (1, SIDE + 2, SIDE + 4, 3)
  np.testing.assert_array_equal(images[0, :SIDE, 4:], IMAGE)
  assert images[0, :, :4].std() > 0


@pytest.mark.parametrize(
  "shape, hidden, words",
  [
    ((8, 6), True, "6x8 pixels, the model draws 6x6: a variation has that size"),
    ((4, 6), False, "6x4 pixels, the model draws 6x6: expected that size"),
    ((7, 8), False, "multiples of 2"),
    ((6, 6), False, "the mask hides no pixel"),
  ],
)
def test_sizes_that_the_model_does_not_draw_are_refused(models, shape, hidden, words):
  image, mask = np.zeros((*shape, 3), np.uint8), np.full(shape, hidden)
  with pytest.raises(UserError, match=words):
    edit(*models, image, mask, [1])


def test_a_larger_strength_redraws_the_same_cells_and_more():
  unknown = np.ones((6, 6), bool)
  unknown[0, 0] = False
  shares = []
  for strength in (0.2, 0.5, 0.9, 1.0):
    settings = EditSettings(strength=strength, keep_rows=2)
    shares.append(redrawn_cells(unknown, settings, seed=4, count=3))
  for fewer, more in zip(shares, shares[1:], strict=False):
    assert (fewer <= more).all() and fewer.sum() < more.sum()
  assert not shares[-1][:, :2].any() and shares[-1][:, 2:].all()
  with pytest.raises(UserError, match=r"strength=1.5: expected 0 .. 1"):
    EditSettings(strength=1.5)


def test_windows_cover_what_is_unknown_and_know_half_where_they_can():
  unknown = np.ones((8, 12), bool)
  unknown[2:6, 4:8] = False
  left = unknown.copy()
  for y, x in tiles(unknown, 4):
    assert left[y : y + 4, x : x + 4].sum() <= 8
    left[y : y + 4, x : x + 4] = False
  assert not left.any()
  assert list(tiles(np.ones((4, 4), bool), 4)) == [(0, 0)]
  assert list(tiles(np.ones((2, 8), bool), (2, 4))) == [(0, 0), (0, 2), (0, 4)]


def test_hidden_pixels_are_filled_by_their_nearest_neighbours():
  hidden = np.zeros((4, 4), bool)
  hidden[:, 2:] = True
  pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  filled = Canvas(pixels, hidden).filled()
  np.testing.assert_array_equal(filled[:, :2], pixels[:, :2])
  np.testing.assert_array_equal(filled[:, 2:], pixels[:, [1, 1]])
