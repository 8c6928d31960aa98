"""Trees of host arrays on the devices."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from llamagen_jax.parallel.mesh import abstract_tree, make_mesh, replicated, shard_tree

TREE = {"a": np.arange(8.0), "b": [np.ones((8, 3), np.float32), None]}


@pytest.mark.parametrize("one", [True, False])
def test_a_tree_lies_as_its_shardings_say(one):
  mesh = make_mesh()
  rows = NamedSharding(mesh, PartitionSpec("data"))
  b = rows if one else replicated(mesh)
  sharding = rows if one else {"a": rows, "b": b}
  found, shapes = shard_tree(TREE, sharding), abstract_tree(TREE, sharding)
  jax.tree.map(np.testing.assert_array_equal, found, TREE)
  assert found["a"].sharding == shapes["a"].sharding == rows
  assert found["b"][0].sharding == shapes["b"][0].sharding == b
  assert shapes["b"][0].shape == (8, 3)
