import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPTConfig
from llamagen_jax.gpt.rope import apply_rope, rope_grid, rope_table
from tests import parity

CONFIG = GPTConfig(1, 2, 200, grid=5, prefix_rope="identity")  # head_dim 100, as 3B


def test_scores_depend_on_the_offset_in_rows_and_columns_only():
  cos, sin = rope_table(CONFIG)
  q, k = parity.randn("q", (1, 1, 1, 100)), parity.randn("k", (1, 1, 1, 100))
  places = {}
  for i, (row, column) in enumerate(np.ndindex(5, 5)):
    at = slice(1 + i, 2 + i)
    if i < 24:  # the last code is no input
      places[row, column] = [apply_rope(x, cos[at], sin[at]) for x in (q, k)]

  def score(a, b):
    return float(jnp.sum(places[a][0] * places[b][1]))

  assert score((0, 0), (1, 2)) == pytest.approx(score((3, 1), (4, 3)), abs=1e-4)
  assert score((0, 0), (1, 2)) != pytest.approx(score((0, 0), (2, 1)), abs=1e-2)


def test_prefix_is_zeroed_or_left_alone():
  x = parity.randn("x", (2, 1, 2, 100))
  for prefix_rope, expected in (("zero", 0 * x), ("identity", x)):
    config = dataclasses.replace(CONFIG, prefix_rope=prefix_rope)
    cos, sin = rope_table(config)
    assert cos.shape == (config.length, 50)
    np.testing.assert_array_equal(apply_rope(x, cos[:1], sin[:1]), expected)


def test_a_code_turns_by_its_row_and_column_whatever_the_grid():
  square = [table.reshape(5, 5, -1) for table in rope_grid(CONFIG)]
  for rows, columns in ((2, 5), (5, 1), (3, 4)):
    config = dataclasses.replace(CONFIG, grid=(rows, columns))
    for table, whole in zip(rope_grid(config), square, strict=True):
      found = table.reshape(rows, columns, -1)
      np.testing.assert_array_equal(found, whole[:rows, :columns])
