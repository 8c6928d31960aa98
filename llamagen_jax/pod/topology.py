"""A mesh of TPU chips that nobody here holds: programs compile for it, none runs."""

import contextlib
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.chips import CHIPS, Chip
from llamagen_jax.parallel.mesh import make_mesh

GENERATIONS = ("v4", "v5e", "v5p", "v6e")


def mesh(topology: str, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh over all chips of `v5e:2x4`, `v5p:4x4x4` ..; -1 = the chips left.

  Sizes count chips along the axes of the torus. Lower what is compiled for it
  under `jax.set_mesh`, with shapes that carry shardings of this mesh; nothing may
  be computed there, not even a constant.
  """
  return make_mesh(data, fsdp, tensor, devices=devices(topology))


def devices(topology: str) -> list[jax.Device]:
  """The chips of a topology, as devices that compile only."""
  generation, _, sizes = topology.partition(":")
  expected = "expected such as v5e:2x4 or v5p:4x4x4"
  if generation not in GENERATIONS:
    known = ", ".join(GENERATIONS)
    raise UserError(f"topology {topology!r}: {expected}, with one of {known}")
  axes = 2 if generation in ("v5e", "v6e") else 3
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes) or sizes.count("x") != axes - 1:
    raise UserError(f"topology {topology!r}: {expected}; {generation} has {axes} axes")
  # There is no TPU whose metadata could be asked for, or that could be in use.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # A v4 chip is one device only where its two cores work as one.
  options = {"chip_config_name": "megacore"} if generation == "v4" else {}
  # A host has 2x2 chips, or fewer where the topology has.
  bounds = [min(2, int(size)) for size in sizes.split("x")[:2]]
  options["chips_per_host_bounds"] = [*bounds, 1]
  try:
    return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
  except (jax.errors.JaxRuntimeError, ImportError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    if "libtpu" in reason and "divisible" not in reason:
      reason += " (it needs the libtpu wheel: pip install 'llamagen_jax[tpu]')"
    raise UserError(f"topology {topology!r}: {reason}") from error


def chip(mesh: Mesh) -> Chip:
  """What the mesh consists of."""
  kind = mesh.devices.flat[0].device_kind
  if kind not in CHIPS:
    raise UserError(f"no data sheet of {kind!r}; known are {', '.join(CHIPS)}")
  return CHIPS[kind]


def torus(mesh: Mesh) -> tuple[int, ...]:
  """Chips along the axes of the torus, axes of one chip left out."""
  coordinates = zip(*(device.coords for device in mesh.devices.flat), strict=True)
  return tuple(size for size in (max(axis) + 1 for axis in coordinates) if size > 1)


@contextlib.contextmanager
def quiet():
  """Hides what libtpu prints on standard error about the TPU that is not there.

  Yields the real standard error, for what a user should see.
  """
  saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(sink, 2)
    with open(saved, "w", closefd=False) as errors:
      yield errors
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(sink)
