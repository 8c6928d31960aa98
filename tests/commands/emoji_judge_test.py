"""The network that says which real emoji a drawn one is nearest to."""

import numpy as np
import pytest

from llamagen_jax.commands import emoji_judge
from llamagen_jax.commands.quickstart_emoji import share_of_copies


def discs(count: int, side: int = 48) -> np.ndarray:
  """Discs of different places and colours on white, uint8 [N, S, S, 3]."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:side, :side]
  images = np.full((count, side, side, 3), 255, np.uint8)
  for image in images:
    cx, cy = rng.uniform(side / 3, 2 * side / 3, 2)
    image[(x - cx) ** 2 + (y - cy) ** 2 < (side / 5) ** 2] = rng.integers(0, 200, 3)
  return images


def test_disturbing_moves_no_ink_in_and_keeps_white_white():
  import jax

  white = np.ones((4, 32, 32, 3), np.float32)
  noise = np.asarray(emoji_judge.disturb(white, jax.random.key(0))) - 1
  assert abs(noise.mean()) < 0.01
  assert noise.std() == pytest.approx(emoji_judge.NOISE, rel=0.1)


@pytest.mark.slow
def test_a_fitted_network_finds_disturbed_images_and_a_fresh_one_finds_fewer():
  images = discs(40)
  fresh = emoji_judge.fit(images, epochs=0, seed=0)
  fitted = emoji_judge.fit(images, epochs=40, seed=0)
  accuracy = [emoji_judge.jittered_accuracy(p, images, seed=1) for p in (fresh, fitted)]
  assert accuracy[1] > 0.8
  assert accuracy[1] > accuracy[0]


def test_ranks_count_nearer_ones_and_no_equal_ones():
  real = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
  drawn = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0.6, 0.8]], np.float32)
  assert emoji_judge.ranks(drawn, real, np.array([1, 2, 0])).tolist() == [0, 2, 2]


def test_copies_are_counted_by_their_distance():
  training, rng = discs(20), np.random.default_rng(1)
  noisy = training[:5] + rng.normal(0, 5, training[:5].shape)
  drawn = np.concatenate([np.clip(noisy, 0, 255), 255 - training[5:10]])
  assert share_of_copies(drawn.astype(np.uint8), training) == 0.5


def test_whitened_features_have_no_mean_and_no_direction_of_their_own():
  rng = np.random.default_rng(0)
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  features = (rng.normal(size=(4000, 3)) * [5, 1, 0.5] + [7, 0, -1]) @ rotation
  found = emoji_judge.whitening(features)
  white = (features - found["mean"]) @ found["white"]
  np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=0.15)
