"""Distances between sets of images, from the features of a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import tqdm

from llamagen_jax.errors import UserError

BLOCK_ROWS = 2048  # features a side of a block of distances: 16 MB of them
PATIENCE = 5  # seconds before progress is shown
LEAST_ROWS = 128  # in the block of a small set
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass
class Moments:
  """Mean and covariance of features that arrive a batch at a time, in float64.

  Batches are centred before they are squared and joined by the formula of Chan,
  Golub and LeVeque (1979), so nothing cancels, and parts may be merged in any order.
  """

  count: int
  mean: np.ndarray  # [C]
  scatter: np.ndarray  # [C, C], sum of (x - mean)(x - mean)^T

  @classmethod
  def empty(cls, width: int) -> "Moments":
    return cls(0, np.zeros(width), np.zeros((width, width)))

  @classmethod
  def of(cls, features_NC: np.ndarray) -> "Moments":
    """Returns the moments of whole features; refuses values that are not finite."""
    moments = cls.empty(features_NC.shape[1])
    for start in range(0, len(features_NC), BLOCK_ROWS):
      moments.add(features_NC[start : start + BLOCK_ROWS])
    return moments

  def add(self, features_NC: np.ndarray) -> None:
    """Adds a batch of features [N, C].

    Raises:
      UserError: for a value that is not finite; nothing was added.
    """
    x = np.asarray(features_NC, np.float64)
    if not len(x):
      return
    if not np.isfinite(x).all():
      bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
      raise UserError(
        f"features of {len(bad)} images are not finite, the first of them row"
        f" {self.count + bad[0]}: the images or the network's weights are broken"
      )
    mean = x.mean(axis=0)
    centred = x - mean
    self.merge(Moments(len(x), mean, centred.T @ centred))

  def merge(self, other: "Moments") -> None:
    """Adds the moments of other images: another shard's or host's."""
    if not other.count:
      return
    count = self.count + other.count
    step = other.mean - self.mean
    outer = np.outer(step, step) * (self.count * other.count / count)
    self.scatter = self.scatter + other.scatter + outer
    self.mean = self.mean + step * (other.count / count)
    self.count = count

  @property
  def covariance(self) -> np.ndarray:
    """Returns the unbiased covariance, [C, C]."""
    if self.count < 2:
      raise UserError(
        f"{self.count} images have no covariance: at least two are needed, and more"
        f" than the {len(self.mean)} features for a result that means something"
      )
    return self.scatter / (self.count - 1)

  @property
  def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
    return self.mean, self.covariance


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
  """Returns the Frechet distance of two sets of features [N, C] as Gaussians."""
  moments = (Moments.of(np.asarray(x)) for x in (features, reference))
  return gaussian_distance(*(m.gaussian for m in moments))


def gaussian_distance(
  one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> float:
  """Returns the Frechet distance of two Gaussians, mean [C] and covariance [C, C].

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), FID (arXiv 1706.08500). With factors
  S = F F^T the trace of the root is the sum of the singular values of F1^T F2. Two
  pivoted Cholesky factors and singular values stay real and exact for singular
  covariances, where scipy's sqrtm turns complex or nan, and no eigenvectors are needed.

  Raises:
    UserError: for moments of other widths, or that are not finite or no covariance.
  """
  (mean1, cov1), (mean2, cov2) = (
    (np.asarray(mean, np.float64), np.atleast_2d(np.asarray(cov, np.float64)))
    for mean, cov in (one, other)
  )
  if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
    raise UserError(f"moments of {mean1.shape[0]} and {mean2.shape[0]} features")
  if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
    raise UserError("moments are not finite: no distance can be told")
  cross = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
  distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
  return float(distance)


def _factor(cov: np.ndarray) -> np.ndarray:
  """Returns F [C, rank] with F F^T = cov, for singular covariances, too."""
  lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
  factor = np.empty((len(cov), rank))
  factor[pivots - 1] = np.tril(lower)[:, :rank]
  error = np.abs(factor @ factor.T - cov).max()
  if error > 1e-6 * np.abs(cov).max():
    raise UserError(
      f"a covariance is not positive semidefinite: it is off by {error:.3g}"
    )
  return factor


def inception_score(logits_NK: np.ndarray, split: int) -> float:
  """Returns the mean over splits of exp(mean KL(p(y|x) | p(y))), arXiv 1606.03498.

  Args:
    logits_NK: logits, or logarithms of probabilities.
    split: images a split; the last one may be shorter.
  """
  logits = np.asarray(logits_NK, np.float64)
  if not len(logits) or not np.isfinite(logits).all():
    raise UserError(f"logits {logits.shape}: expected at least one row, all finite")
  scores = []
  for start in range(0, len(logits), split):
    x = logits[start : start + split]
    x = x - x.max(axis=1, keepdims=True)
    p = np.exp(x)
    p /= p.sum(axis=1, keepdims=True)
    mean = p.mean(axis=0, keepdims=True)
    ratio = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(mean, 1e-300))
    scores.append(np.exp((p * ratio).sum(axis=1).mean()))
  return float(np.mean(scores))


def precision_recall(
  reference: np.ndarray, samples: np.ndarray, neighbours: int = 3
) -> tuple[float, float]:
  """Returns improved precision and recall (arXiv 1904.06991).

  Precision is the share of samples that lie within a reference image's distance to
  its k-th nearest neighbour; recall the share of references within a sample's.
  Distances are computed in blocks on the device: the whole matrix never exists.

  Args:
    reference: features [M, C].
    samples: features [N, C].
    neighbours: k.

  Raises:
    UserError: for sets that have no k-th neighbour, or values that are not finite.
  """
  sets = {"reference": reference, "samples": samples}
  for name, x in sets.items():
    if len(x) <= neighbours:
      raise UserError(
        f"{name}: {len(x)} images have no {neighbours} neighbours each: give more"
      )
    if not np.isfinite(x).all():
      raise UserError(f"{name}: features are not finite")
  if reference.shape[1] != samples.shape[1]:
    raise UserError(f"{reference.shape[1]} and {samples.shape[1]} features")
  # Around a common middle, |x|^2 + |y|^2 - 2 x y loses fewer digits.
  middle = np.mean(reference, axis=0, dtype=np.float64).astype(np.float32)
  ours, theirs = _Blocks(samples, middle), _Blocks(reference, middle)
  pairs = theirs.count**2 + ours.count**2 + theirs.count * ours.count
  with tqdm.tqdm(
    total=pairs, desc="precision and recall", unit="distance", unit_scale=True,
    dynamic_ncols=True, delay=PATIENCE,
  ) as bar:  # fmt: skip
    return _precision_recall(theirs, ours, neighbours, bar)


def _precision_recall(reference, samples, neighbours: int, bar) -> tuple[float, float]:
  reference_radii = _radii(reference, neighbours, bar)
  sample_radii = _radii(samples, neighbours, bar)
  sample_hit = np.zeros(samples.count, bool)
  reference_hit = np.zeros(reference.count, bool)
  for rows in reference.parts:
    x, x_radii = reference[rows], reference.padded(reference_radii[rows], -1)
    for columns in samples.parts:
      y, y_radii = samples[columns], samples.padded(sample_radii[columns], -1)
      inside_x, inside_y = _hits(x, x_radii, y, y_radii)
      sample_hit[columns] |= np.asarray(inside_x)[: columns.stop - columns.start]
      reference_hit[rows] |= np.asarray(inside_y)[: rows.stop - rows.start]
      bar.update((rows.stop - rows.start) * (columns.stop - columns.start))
  return float(sample_hit.mean()), float(reference_hit.mean())


class _Blocks:
  """Features in blocks of one size, so that one program serves all of them."""

  def __init__(self, features_NC: np.ndarray, middle_C: np.ndarray):
    self.count = len(features_NC)
    self._features, self._middle = features_NC, middle_C
    self._rows = min(BLOCK_ROWS, -(-self.count // LEAST_ROWS) * LEAST_ROWS)
    starts = range(0, self.count, self._rows)
    self.parts = [slice(i, min(i + self._rows, self.count)) for i in starts]

  def __getitem__(self, part: slice) -> jax.Array:
    return self.padded(np.asarray(self._features[part], np.float32) - self._middle, 0)

  def padded(self, x: np.ndarray, value: float) -> jax.Array:
    width = [(0, self._rows - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.asarray(np.pad(x, width, constant_values=value))


def _radii(blocks: _Blocks, neighbours: int, bar) -> np.ndarray:
  """Returns the squared distance to the k-th nearest other row of the set, [N]."""
  radii = np.empty(blocks.count, np.float32)
  for rows in blocks.parts:
    x = blocks[rows]
    nearest = jnp.full((len(x), neighbours), jnp.inf, jnp.float32)
    for columns in blocks.parts:
      offset, valid = rows.start - columns.start, columns.stop - columns.start
      nearest = _nearer(nearest, x, blocks[columns], offset, valid)
    radii[rows] = np.asarray(nearest)[: rows.stop - rows.start, -1]
    bar.update((rows.stop - rows.start) * blocks.count)
  return radii


def _squared_distances(x_MC: jax.Array, y_NC: jax.Array) -> jax.Array:
  products = jnp.matmul(x_MC, y_NC.T, precision=HIGHEST)
  squares = jnp.sum(x_MC**2, axis=1)[:, None] + jnp.sum(y_NC**2, axis=1)
  return jnp.maximum(squares - 2 * products, 0)


@functools.partial(jax.jit, donate_argnums=0)
def _nearer(nearest_MK, x_MC, y_NC, offset, valid):
  """Returns the K smallest distances, so far and to y, sorted, without itself."""
  distances = _squared_distances(x_MC, y_NC)
  row, column = (jnp.arange(n) for n in distances.shape)
  skip = (column == row[:, None] + offset) | (column >= valid)
  distances = jnp.where(skip, jnp.inf, distances)
  best = -jax.lax.top_k(-distances, nearest_MK.shape[1])[0]
  return jnp.sort(jnp.concatenate([nearest_MK, best], axis=1))[:, : nearest_MK.shape[1]]


@jax.jit
def _hits(x_MC, x_radii_M, y_NC, y_radii_N):
  """Returns which y lie within the radius of any x [N], and x in that of any y [M]."""
  distances = _squared_distances(x_MC, y_NC)
  inside_x = jnp.any(distances <= x_radii_M[:, None], axis=0)
  inside_y = jnp.any(distances <= y_radii_N, axis=1)
  return inside_x, inside_y
