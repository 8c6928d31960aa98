"""Small networks that are fitted in memory."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamagen_jax.commands.fitting import fit, shuffled_rows


@pytest.mark.parametrize("count, batch", [(12, 4), (13, 4), (3, 3)])
def test_an_epoch_has_a_row_at_most_once(count, batch):
  rng = np.random.default_rng(0)
  found = np.array(list(shuffled_rows(count, batch, 5, rng)))
  epochs = found.reshape(5, -1)
  assert epochs.shape[1] == count // batch * batch
  for rows in epochs:
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(count))
  assert len({tuple(rows) for rows in epochs}) > 1


def test_fit_finds_a_line_and_takes_a_step_for_every_batch():
  x = np.linspace(-1, 1, 32).astype(np.float32)

  def loss_fn(params, x, y):
    return jnp.mean((params["slope"] * x + params["start"] - y) ** 2)

  def batches():
    for rows in shuffled_rows(32, 8, 50, np.random.default_rng(0)):
      yield x[rows], 3 * x[rows] - 1

  params = {"slope": jnp.zeros(()), "start": jnp.zeros(())}
  found = fit(loss_fn, params, optax.adam(0.1), batches(), steps=200, name="line")
  np.testing.assert_allclose((found["slope"], found["start"]), (3, -1), atol=0.02)
  one = fit(loss_fn, params, optax.sgd(0.1), [(x, 3 * x - 1)], steps=1, name="line")
  np.testing.assert_allclose(one["start"], -0.2, atol=1e-6)  # -lr * 2 * mean(error)


def test_without_batches_the_parameters_stay():
  params = {"a": jnp.ones(2)}
  found = fit(lambda p: jnp.sum(p["a"]), params, optax.sgd(1.0), [], steps=0, name="x")
  np.testing.assert_array_equal(found["a"], params["a"])
