"""Distances between sets of pictures, from the features of a network."""

import numpy as np

from llamagen_jax.errors import UserError


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
  """Frechet distance of two sets of features [N, C] taken as Gaussians.

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), FID (arXiv 1706.08500). The trace of
  the root is the sum of the singular values of S1^(1/2) S2^(1/2), which needs two
  symmetric eigenvalue problems and stays real for singular covariances.
  """
  moments = [_moments(np.asarray(x, np.float64)) for x in (features, reference)]
  (mean1, cov1), (mean2, cov2) = moments
  cross = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
  return float(
    np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
  )


def _moments(features_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if len(features_NC) < 2 or not np.isfinite(features_NC).all():
    raise UserError(
      f"features {features_NC.shape}: expected at least two rows, all finite"
    )
  return features_NC.mean(axis=0), np.atleast_2d(np.cov(features_NC, rowvar=False))


def _root(cov: np.ndarray) -> np.ndarray:
  """Square root of a symmetric positive semidefinite matrix."""
  values, vectors = np.linalg.eigh(cov)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
