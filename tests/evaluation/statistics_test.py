"""Frechet distance, Inception Score, precision and recall."""

import numpy as np
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.statistics import (
  Moments,
  frechet_distance,
  gaussian_distance,
  inception_score,
  precision_recall,
)
from tests import parity


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_metrics_equal_the_golden_ones():
  golden = parity.golden()
  reference, samples = golden["metrics_ref"], golden["metrics_sample"]
  fid = frechet_distance(samples, reference)
  np.testing.assert_allclose(fid, golden["metrics_fid"], rtol=1e-6)
  score = inception_score(np.log(golden["metrics_probs"].astype(np.float64)), 100)
  np.testing.assert_allclose(score, golden["metrics_is_split100"], rtol=1e-6)
  precision, recall = precision_recall(reference, samples)
  np.testing.assert_allclose(precision, golden["metrics_precision"], rtol=1e-6)
  np.testing.assert_allclose(recall, golden["metrics_recall"], rtol=1e-6)


def test_distance_of_known_gaussians():
  rotation = np.linalg.qr(random(6, 6).astype(np.float64))[0]
  a, b = np.array([4.0, 1, 9, 0, 2, 1]), np.array([1.0, 1, 4, 0, 0, 25])
  mean = np.arange(6.0)
  one = (mean, rotation * a @ rotation.T)
  other = (mean + 2, rotation * b @ rotation.T)
  expected = 6 * 4 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  np.testing.assert_allclose(gaussian_distance(one, other), expected, rtol=1e-9)


def test_distance_of_singular_covariances_is_finite():
  x, y = random(20, 64), random(20, 64, seed=1)  # rank 19
  assert np.isfinite(frechet_distance(x, y)) and frechet_distance(x, y) > 0
  assert abs(frechet_distance(x, x)) < 1e-4


def test_merged_shards_equal_the_whole():
  x = random(1000, 16) * 3 + 100
  whole = Moments.of(x)
  merged = Moments.empty(16)
  for part in np.split(x, [1, 300, 300, 720])[::-1]:
    merged.merge(Moments.of(part))
  assert merged.count == whole.count == 1000
  np.testing.assert_allclose(merged.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
  expected = np.cov(x.astype(np.float64), rowvar=False)
  np.testing.assert_allclose(merged.covariance, expected, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(whole.covariance, expected, rtol=1e-9, atol=1e-12)


def brute_force(reference, samples, k=3):
  def distances(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.stack([((row - y) ** 2).sum(axis=1) for row in x])

  def radii(x):
    return np.sort(distances(x, x), axis=1)[:, k]  # 0 is the row itself

  between = distances(reference, samples)
  precision = (between <= radii(reference)[:, None]).any(axis=0).mean()
  recall = (between <= radii(samples)).any(axis=1).mean()
  return precision, recall


def test_precision_and_recall_equal_brute_force_over_several_blocks():
  reference = random(2000, 64)
  samples = random(2500, 64, seed=1) * 0.95 + 0.05
  found = precision_recall(reference, samples)
  expected = brute_force(reference, samples)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  assert 0.1 < found[0] < 1 and found[0] != found[1]
  np.testing.assert_allclose(precision_recall(samples, reference), found[::-1])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: frechet_distance(random(1, 4), random(9, 4)), "1 images have no cov"),
    (lambda: frechet_distance(random(9, 4) * np.nan, random(9, 4)), "not finite"),
    (lambda: frechet_distance(random(9, 5), random(9, 4)), "5 and 4 features"),
    (
      lambda: gaussian_distance(*[(np.zeros(2), -np.eye(2))] * 2),
      "not positive semidefinite",
    ),
    (lambda: precision_recall(random(3, 4), random(9, 4)), "reference: 3 images"),
    (lambda: precision_recall(random(9, 4), random(9, 4) * np.inf), "samples: .*fin"),
    (lambda: inception_score(random(9, 4) * np.nan, 5), "all finite"),
  ],
)
def test_degenerate_inputs_are_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()


def test_constant_features_have_a_distance():
  constant = np.full((9, 4), 3, np.float32)
  assert frechet_distance(constant, constant) == 0
  assert frechet_distance(constant, constant + 1) == 4
