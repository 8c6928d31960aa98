"""Fits a small network on data that lies in memory: what the quickstarts do besides.

Nothing is kept on the way: it takes a minute or two, and begins again when killed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import tqdm

LOG_EVERY = 20  # steps


def fit(
  loss_fn: Callable[..., jax.Array],
  params: Any,
  optimizer: optax.GradientTransformation,
  batches: Iterable[tuple],
  *,
  steps: int,
  name: str,
) -> Any:
  """Takes a step for every batch, with a progress bar, and returns the parameters.

  Args:
    loss_fn: from parameters and the parts of a batch to a loss.
    batches: `steps` of them.
    name: what is fitted, for the progress bar.
  """

  @jax.jit
  def step(params, state, *batch):
    loss, gradients = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  progress = tqdm.tqdm(batches, name, steps, unit="step")
  for number, batch in enumerate(progress, start=1):
    params, state, loss = step(params, state, *batch)
    if number % LOG_EVERY == 0:
      progress.set_postfix(loss=f"{loss:.3f}")
  return params


def shuffled_rows(
  count: int, batch: int, epochs: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
  """Yields the rows of every batch, in a new order each epoch; the last ones drop."""
  for _ in range(epochs):
    order = rng.permutation(count)
    for start in range(0, count - batch + 1, batch):
      yield order[start : start + batch]
