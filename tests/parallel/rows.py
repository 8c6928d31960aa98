"""A host of two: its rows of a batch become the whole batch, on meshes of any order."""

import sys

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from llamagen_jax.parallel.mesh import AXES, host_rows, make_data_mesh, to_global

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
devices = np.asarray(jax.devices())
meshes = {
  "neighbours": devices.reshape(8, 1, 1),
  "apart, as on a torus": devices[[0, 5, 2, 7, 4, 1, 6, 3]].reshape(4, 2, 1),
  "tensor over both hosts": devices[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(2, 2, 2),
  "nothing but tensor": devices.reshape(1, 1, 8),
}
batch = {"codes": np.arange(48).reshape(16, 3), "label": np.arange(16)}
for name, grid in meshes.items():
  mesh = Mesh(grid, AXES)
  rows = host_rows(mesh, 16)
  found = to_global({key: value[rows] for key, value in batch.items()}, mesh)
  whole = multihost_utils.process_allgather(found, tiled=True)
  jax.tree.map(np.testing.assert_array_equal, whole, batch)
  print(f"rows of {name}: {len(rows)}.")
first = 8 * jax.process_index()
np.testing.assert_array_equal(
  host_rows(make_data_mesh(), 16), np.arange(first, first + 8)
)
