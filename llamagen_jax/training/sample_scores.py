"""Inception Score of a run's samples while it trains.

It shows whether images get better, and is no published score: of fewer samples it is
lower.

Axes: N samples, K classes of Inception.
"""

from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.statistics import inception_score
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


class SampleScores:
  """Scores samples of random classes, of the same classes and seeds every time."""

  def __init__(self, config: ImagesConfig, model: GPTConfig):
    """Reads Inception's weights, so that a wrong file is told before the run.

    Raises:
      UserError: there are no such weights, or the model is one of captions.
    """
    c, self._config, self._params = config, config, None
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

  def __call__(
    self, gpt: bundle.Transformer, tokenizer: bundle.Tokenizer, mesh: jax.sharding.Mesh
  ) -> dict[str, float]:
    """Returns {"IS": score}, or {} where the config asks for none, on all hosts."""
    c = self._config
    if not c.scored:
      return {}
    labels = choose_labels("uniform", c.scored, gpt.config.num_classes, c.seed)
    images = sample(gpt, tokenizer, labels.tolist(), seed=c.seed, batch_size=BATCH_SIZE)
    # For the time of the scores alone: training may need the memory.
    params = shard_tree(self._params, replicated(mesh))
    return {"IS": inception_score(inception_logits(params, images, mesh), c.scored)}


def inception_logits(
  params: Any, images: np.ndarray, mesh: jax.sharding.Mesh
) -> np.ndarray:
  """Returns float32 logits [N, K] of uint8 images [N, H, W, 3], whole on every host.

  Args:
    params: from `load_inception`, on the mesh.
    images: whole on every host; the data shards of the mesh share them.
    mesh: of all devices.
  """
  size = BATCH_SIZE * num_data_shards(mesh)
  logits = []
  for start in range(0, len(images), size):
    rows = images[start : start + size]
    padding = [(0, size - len(rows)), (0, 0), (0, 0), (0, 0)]
    batch = shard_tree(np.pad(rows, padding), batch_sharding(mesh))
    found = extract_features(params, batch).logits
    found = multihost_utils.process_allgather(found, tiled=True)
    logits.append(np.asarray(found)[: len(rows)])
  return np.concatenate(logits)
