"""A small classifier of digits: the quickstart's judge.

It is fitted on real training digits only and never sees a generated one.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamagen_jax.commands.fitting import fit, shuffled_rows

BATCH = 50
LEARNING_RATE = 2e-3
LARGEST_SHIFT = 2  # pixels, augmentation


class DigitClassifier(nn.Module):
  """uint8 [B, 32, 32, 3] -> logits [B, 10] and features [B, 64]."""

  @nn.compact
  def __call__(self, images):
    x = images[..., :1].astype(jnp.float32) / 255
    for width in (16, 32, 64):
      x = nn.relu(nn.Conv(width, (3, 3))(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
    return nn.Dense(10)(features), features


def fit_classifier(
  images: np.ndarray, labels: np.ndarray, *, epochs: int, seed: int
) -> Any:
  """Fits on uint8 digits with random shifts; returns parameters."""
  model, rng = DigitClassifier(), np.random.default_rng(seed)
  steps = epochs * (len(images) // BATCH)
  optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps))

  def loss_fn(params, x, y):
    logits, _ = model.apply(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

  def batches():
    for rows in shuffled_rows(len(images), BATCH, epochs, rng):
      shift = rng.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, 2)
      yield np.roll(images[rows], shift, axis=(1, 2)), labels[rows]

  params = jax.jit(model.init)(jax.random.key(seed), images[:1])
  return fit(loss_fn, params, optimizer, batches(), steps=steps, name="classifier")


def classify(params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """uint8 digits -> predicted labels [B] and features [B, 64]."""
  batches = (images[i : i + 500] for i in range(0, len(images), 500))
  logits, features = read_digits(params, batches)
  return logits.argmax(axis=1), features


def read_digits(
  params: Any, batches: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Batches of uint8 digits -> logits [N, 10] and features [N, 64] of all."""
  found = [_apply(params, images) for images in batches]
  logits, features = (np.concatenate(x) for x in zip(*found, strict=True))
  return logits, features


@jax.jit
def _apply(params, images):
  return DigitClassifier().apply(params, images)
