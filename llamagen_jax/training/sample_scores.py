"""Inception Score and precision of a run's samples while it trains.

They show whether images get better, and are no published scores: of fewer samples the
Inception Score is lower.

Axes: N images, C features, K classes of Inception.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.evaluation.score import MAX_REFERENCE
from llamagen_jax.evaluation.statistics import inception_score, precision_recall
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.parallel.mesh import batch_sharding, replicated, shard_tree
from llamagen_jax.sampling.fid_batch import choose_labels
from llamagen_jax.sampling.sample import num_data_shards, sample
from llamagen_jax.storage import user_path
from llamagen_jax.training.sample_grid import ImagesConfig
from llamagen_jax.vision.inception import extract_features
from llamagen_jax.weights import bundle
from llamagen_jax.weights.inception import load_inception

BATCH_SIZE = 32  # images at a time on every data shard
NEIGHBOURS = 3  # of precision, as published


class SampleScores:
  """Scores samples of random classes, of the same classes and seeds every time."""

  def __init__(self, config: ImagesConfig, model: GPTConfig):
    """Reads Inception's weights, so that a wrong file is told before the run.

    Raises:
      UserError: no such weights or reference, or a model of captions.
    """
    c, self._config, self._params = config, config, None
    self._real, self._real_NC = None, None
    if not c.scored:
      return
    if model.condition != "class":
      raise UserError(
        f"images.scored={c.scored}: expected model.condition='class', found"
        f" {model.condition!r}"
      )
    if not user_path(c.inception).exists():
      raise UserError(f"images.inception={c.inception}: no such file or folder")
    self._params = load_inception(c.inception)
    if c.reference:
      self._real = open_image_set("images.reference", c.reference)
      if min(self._real.count, c.scored) <= NEIGHBOURS:
        raise UserError(
          f"images.reference={c.reference}: {self._real.count} images, and"
          f" images.scored={c.scored}; expected more than {NEIGHBOURS} of each"
        )

  def __call__(
    self, gpt: bundle.Transformer, tokenizer: bundle.Tokenizer, mesh: jax.sharding.Mesh
  ) -> dict[str, float]:
    """Returns IS, and precision where there is a reference, on all hosts."""
    c = self._config
    if not c.scored:
      return {}
    labels = choose_labels("uniform", c.scored, gpt.config.num_classes, c.seed)
    images = sample(gpt, tokenizer, labels.tolist(), seed=c.seed, batch_size=BATCH_SIZE)
    # For the time of the scores alone: training may need the memory.
    params = shard_tree(self._params, replicated(mesh))
    size = BATCH_SIZE * num_data_shards(mesh)
    batches = (images[i : i + size] for i in range(0, len(images), size))
    pool_NC, logits_NK = inception_features(params, batches, mesh)
    scores = {"IS": inception_score(logits_NK, c.scored)}
    if self._real is not None:
      if self._real_NC is None:
        count = min(self._real.count, MAX_REFERENCE)
        starts = range(0, count, size)
        real = self._real.read(range(i, min(i + size, count)) for i in starts)
        self._real_NC, _ = inception_features(params, real, mesh)
      scores["precision"], _ = precision_recall(self._real_NC, pool_NC, NEIGHBOURS)
    return scores


def inception_features(
  params: Any, batches: Iterable[np.ndarray], mesh: jax.sharding.Mesh
) -> tuple[np.ndarray, np.ndarray]:
  """Returns pool [N, C] and logits [N, K], float32, whole on every host.

  Args:
    params: from `load_inception`, on the mesh.
    batches: uint8 images [B, H, W, 3] of at most BATCH_SIZE for every data shard of the
      mesh, whole on every host; the data shards share them.
    mesh: of all devices.
  """
  size = BATCH_SIZE * num_data_shards(mesh)
  pool, logits = [], []
  for images in batches:
    padding = [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]
    batch = shard_tree(np.pad(images, padding), batch_sharding(mesh))
    found = extract_features(params, batch)
    for parts, x in ((pool, found.pool), (logits, found.logits)):
      whole = multihost_utils.process_allgather(x, tiled=True)
      parts.append(np.asarray(whole)[: len(images)])
  return np.concatenate(pool), np.concatenate(logits)
