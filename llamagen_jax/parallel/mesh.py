"""The device mesh and the one table that shards everything on it.

Parameters name their axes where they are declared (`nn.with_logical_partitioning`);
this file alone says which mesh axis a named axis lies on.
"""

import collections
from collections.abc import Callable, Sequence
import contextlib
import math
from typing import Any

from absl import logging
import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from llamagen_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is not listed is replicated.
RULES = {
  "batch": ("data", "fsdp"),  # images and sequences, never their positions
  "embed": ("fsdp",),  # D: weights are gathered layer by layer
  "kv_heads": ("tensor",),  # K: a head's query, key and value stay together
  "ffn": ("tensor",),  # F
  "vocab": ("tensor",),  # V
  "conv_out": ("fsdp",),  # output channels of the tokenizer's convolutions
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
  slices: int = -1,
) -> Mesh:
  """Returns a mesh over all devices; a size of -1 takes the devices that are left.

  Slices, groups of chips that only a data-center network connects, lie along `data`:
  weights are gathered inside of a slice, and gradients alone go between slices.

  Args:
    data: size of the axis along which weights are replicated.
    fsdp: size of the axis along which weights are gathered layer by layer.
    tensor: size of the axis along which layers are split.
    devices: all of JAX's by default.
    slices: how many there are; -1 = as the devices say (one, if they are not TPUs).

  Raises:
    UserError: the sizes do not multiply to the number of devices, `data` is not a
      multiple of the slices, or the devices come from another number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"mesh {sizes}: sizes are positive, and one of them may be -1")
  if free:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    raise UserError(
      f"mesh {sizes} holds {math.prod(sizes.values())} devices, but"
      f" {len(devices)} are here"
    )
  return _mesh(_device_grid(tuple(sizes.values()), devices, slices))


def make_data_mesh() -> Mesh:
  """Returns a mesh of all devices along `data`, host after host.

  So every host has a block of rows, in the order of the hosts. `make_mesh` follows the
  torus of a pod instead.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  return _mesh(np.asarray(devices).reshape(-1, 1, 1))


def _mesh(grid: np.ndarray) -> Mesh:
  # Flax layers leave the placement of intermediates to the compiler.
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _device_grid(
  shape: tuple[int, ...], devices: Sequence[jax.Device], slices: int
) -> np.ndarray:
  """Returns devices in the shape of a mesh, neighbours on the torus side by side."""
  named = len({getattr(device, "slice_index", 0) for device in devices})
  if named > 1 and slices not in (-1, named):
    raise UserError(f"mesh.slices={slices}, but the chips come from {named} slices")
  slices = named if slices == -1 else slices
  if slices < 1 or shape[0] % slices:
    raise UserError(f"mesh.data={shape[0]} is not a multiple of mesh.slices={slices}")
  if named == 1 and slices > 1:  # not TPUs: the devices of a host, then the next host's
    return np.asarray(devices).reshape(shape)
  inner = (shape[0] // slices, *shape[1:])

  def grid(split: bool) -> np.ndarray:
    if slices == 1:
      return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=split
      )
    return mesh_utils.create_hybrid_device_mesh(
      inner, (slices, 1, 1), devices, allow_split_physical_axes=split
    )

  try:
    return grid(split=False)
  except NotImplementedError:  # no axis of the torus has the size of one of the mesh
    return grid(split=True)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Returns a context in which programs of a mesh, if any, are compiled and called."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spec(mesh: Mesh, shape: tuple[int, ...], names: tuple) -> PartitionSpec:
  """Returns how an array with these logical axes is partitioned.

  An axis that the mesh does not divide, or whose mesh axis is taken by an
  earlier one, is replicated.
  """
  partition, used = [], set()
  for size, name in zip(shape, names, strict=True):
    axes = tuple(a for a in RULES.get(name, ()) if mesh.shape[a] > 1 and a not in used)
    if axes and size % math.prod(mesh.shape[a] for a in axes):
      axes = ()
    used.update(axes)
    partition.append(axes[0] if len(axes) == 1 else axes or None)
  return PartitionSpec(*partition)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation's sharding; does nothing where no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, names))


def on_every_part(
  function: Callable[[jax.Array], jax.Array], x: jax.Array, *names: str | None
) -> jax.Array:
  """Applies a function that XLA cannot partition to every chip's shard of an array.

  Args:
    function: gives an array of the shape of its argument.
    x: any array.
    names: logical axes, one an axis of `x`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(x)
  partition = spec(mesh, x.shape, names)
  return jax.shard_map(function, in_specs=partition, out_specs=partition)(x)


def unbox(boxed: Any) -> Any:
  """Returns the tree without the boxes that carry logical names."""
  return jax.tree.map(
    lambda leaf: leaf.value if is_boxed(leaf) else leaf, boxed, is_leaf=is_boxed
  )


def is_boxed(leaf: Any) -> bool:
  """Returns whether a leaf carries the logical names of its axes."""
  return isinstance(leaf, nn.LogicallyPartitioned)


def shardings(mesh: Mesh, boxed: Any) -> Any:
  """Returns the NamedShardings of the unboxed tree of an abstract boxed one.

  Logs, once for each name and size, the axes that have a rule but are replicated.
  """
  replicated = collections.Counter()

  def sharding(leaf):
    if not is_boxed(leaf):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(leaf.value):  # the moments of a weight that is not trained
      return leaf.value
    partition = spec(mesh, leaf.value.shape, leaf.names)
    for name, size, axes in zip(leaf.names, leaf.value.shape, partition, strict=True):
      wanted = [a for a in RULES.get(name, ()) if mesh.shape[a] > 1]
      if wanted and axes is None:
        replicated[name, size, "/".join(wanted)] += 1
    return NamedSharding(mesh, partition)

  tree = jax.tree.map(sharding, boxed, is_leaf=is_boxed)
  for (name, size, wanted), count in replicated.items():
    parts = math.prod(mesh.shape[a] for a in wanted.split("/"))
    logging.warning(
        "%d arrays keep axis %r (%d) whole on every chip: %s has %d parts",
        count, name, size, wanted, parts,
    )  # fmt: skip
  return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every chip holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shard_tree(tree: Any, sharding: Any) -> Any:
  """Puts arrays that every host has whole on the devices; each keeps its shard.

  Args:
    tree: host arrays; no device takes part but those of `sharding`.
    sharding: a Sharding, or a tree of them of which `tree` is an extension.
  """
  return jax.tree.map(
    lambda leaf, where: jax.make_array_from_callback(
      np.shape(leaf), where, lambda index: np.asarray(leaf)[index]
    ),
    tree,
    jax.tree.broadcast(sharding, tree),
  )


def abstract_tree(tree: Any, sharding: Any) -> Any:
  """Returns the shapes, dtypes and shardings that `shard_tree` would give."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    tree,
    jax.tree.broadcast(sharding, tree),
  )


def host_parts(mesh: Mesh) -> tuple[list[int], int]:
  """Returns which parts of a batch this host's chips hold, and of how many.

  A part is the rows of one place along `data` and `fsdp`. Those of a host need not be
  neighbours, as 0, 1, 6 and 15 of the first host of v5e:4x4; where `tensor` reaches
  over several hosts, these hold the same ones.
  """
  count = math.prod(mesh.shape[axis] for axis in RULES["batch"])
  held = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
  return sorted({range(count)[index[0]].start for index in held if index}), count


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns the rows of a batch that this host's chips hold, ascending, int [rows]."""
  parts, count = host_parts(mesh)
  return np.arange(batch_size).reshape(count, -1)[parts].ravel()


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns arrays over all chips of what every host has: the rows of `host_rows`."""
  sharding, (parts, count) = batch_sharding(mesh), host_parts(mesh)

  def array(local: np.ndarray) -> jax.Array:
    size = len(local) // len(parts)
    shape = (count * size, *local.shape[1:])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      place = parts.index(range(shape[0])[index[0]].start // size)
      return local[place * size : (place + 1) * size]

    return jax.make_array_from_callback(shape, sharding, shard)

  return {name: array(value) for name, value in batch.items()}
