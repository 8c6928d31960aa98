"""Figures of a few thousand images that published ones can be held against.

IS of one split of 5 000 is an unbiased sample of the published mean over splits, and
precision a mean over samples against a fixed reference, so both can be compared at
5 000 samples. Recall and FID depend on the number of samples: FID is extrapolated and
stays an estimate. The labels have to be random: as many samples of every class raise
IS by 3 to 4 %.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from llamagen_jax.evaluation import statistics
from llamagen_jax.evaluation.protocols import different_settings

PUBLISHED_SAMPLES = 50_000  # of a published FID
PASS, FAIL, ESTIMATE = "pass", "FAIL", "estimate"
MISSING, NO_FIGURE = "not measured", "no figure"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A measurement, and how far it may be from a published one.

  The tolerance is two to three standard errors at `images`, and grows with the
  standard error where there are fewer.
  """

  title: str
  tolerance: float
  images: int
  relative: bool = False
  estimate: bool = False  # never passes or fails

  def tolerance_of(self, expected: float, images: int) -> float:
    """Returns the largest difference that passes, for this many images."""
    scale = max(1.0, (self.images / images) ** 0.5)
    return self.tolerance * scale * (abs(expected) if self.relative else 1.0)


FIGURES = {
  "psnr": Figure("PSNR", 0.3, 1000),
  "ssim_lg": Figure("SSIM, range 2", 0.01, 1000),
  "IS": Figure("IS", 0.04, 5000, relative=True),
  "precision": Figure("precision", 0.015, 5000),
  "class_match": Figure("class match", 0.02, 5000),
  "FID": Figure("FID, extrapolated", 0.35, 10_000, estimate=True),
}
SETTINGS = "sampling settings"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  title: str
  found: float | None
  expected: float | None
  tolerance: float | None
  verdict: str
  note: str = ""


def extrapolated_fid(
  features_NC: np.ndarray, gaussian: tuple[np.ndarray, np.ndarray]
) -> float:
  """Returns FID at 50 000 samples, from a line in 1/N through N/4, N/2 and N samples.

  FID's bias falls as 1/N (arXiv 1911.07023, section 3.1).

  Args:
    features_NC: of samples in random order.
    gaussian: mean and covariance of the reference.
  """
  counts = [len(features_NC) // part for part in (4, 2, 1)]
  distances = [
    statistics.gaussian_distance(
      statistics.Moments.of(features_NC[:count]).gaussian, gaussian
    )
    for count in counts
  ]
  slope, offset = np.polyfit(1 / np.array(counts), distances, 1)
  return float(offset + slope / PUBLISHED_SAMPLES)


def compare(
  found: Mapping[str, tuple[float, int]],
  expected: Mapping[str, float],
  missing: Mapping[str, str],
) -> list[Row]:
  """Returns a row for every figure that was measured, or that something lacks for.

  Args:
    found: values, and of how many images each is.
    expected: published figures, or those of weights that are known to be right.
    missing: what a figure needs that was not given.
  """
  rows = []
  for name, figure in FIGURES.items():
    if name not in found:
      if name in missing:
        rows.append(Row(figure.title, None, None, None, MISSING, missing[name]))
      continue
    value, images = found[name]
    known, tolerance, verdict = expected.get(name), None, NO_FIGURE
    if known is not None:
      tolerance = figure.tolerance_of(known, images)
      verdict = PASS if abs(value - known) <= tolerance else FAIL
    if figure.estimate:
      verdict = ESTIMATE
    rows.append(Row(figure.title, value, known, tolerance, verdict, f"{images} images"))
  return rows


def compare_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Row:
  """Returns the row that says whether samples were made as the figures' were."""
  different = [
    f"{name} is {value}, the figures' {other}"
    for name, (value, other) in different_settings(ours, theirs).items()
  ]
  verdict = FAIL if different else PASS
  return Row(SETTINGS, None, None, None, verdict, "; ".join(different))


def table(rows: list[Row]) -> str:
  """Returns the rows in Markdown."""
  lines = ["| check | ours | expected | may differ by | verdict | |", "|---" * 6 + "|"]
  for row in rows:
    values = (row.found, row.expected, row.tolerance)
    cells = ["" if value is None else f"{value:.4g}" for value in values]
    lines.append(f"| {row.title} | {' | '.join(cells)} | {row.verdict} | {row.note} |")
  return "\n".join(lines)
