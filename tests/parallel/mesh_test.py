"""Trees of host arrays on the devices."""

import types

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.parallel import mesh as mesh_module
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


@pytest.mark.parametrize(
  "sizes, words",
  [
    ({"slices": 0}, "not a multiple of mesh.slices=0"),
    ({"slices": 3}, r"mesh.data=\d+ is not a multiple of mesh.slices=3"),
  ],
)
def test_slices_that_do_not_divide_the_data_axis(sizes, words):
  with pytest.raises(UserError, match=words):
    make_mesh(devices=jax.devices()[:1], **sizes)


def test_slices_lie_along_the_data_axis():
  """Eight fake devices in two slices: neighbours in memory share a slice."""
  devices = [types.SimpleNamespace(id=n, platform="cpu") for n in range(8)]
  grid = mesh_module._device_grid((2, 2, 2), devices, 2)
  assert [[d.id for d in half.flat] for half in grid] == [[0, 1, 2, 3], [4, 5, 6, 7]]
