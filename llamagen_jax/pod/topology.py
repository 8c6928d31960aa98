"""A mesh of TPU chips that are not here: programs compile for it, none runs on it."""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.chips import CHIPS, Chip
from llamagen_jax.parallel.mesh import make_mesh

AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # of the torus
EXPECTED = "expected such as v5e:2x4, v5p:4x4x4, or v5e:16x16x2 for two slices"


@dataclasses.dataclass(frozen=True)
class Topology:
  """The chips of `v5e:2x4`; of `v5e:16x16x2`, two slices of 16x16 chips."""

  generation: str
  sizes: tuple[int, ...]  # chips along the axes of a slice's torus
  slices: int = 1

  @property
  def devices(self) -> int:
    """Devices as JAX counts them, of all slices."""
    cores = 2 if self.generation == "tpu7x" else 1
    return cores * math.prod(self.sizes) * self.slices

  @property
  def slice_name(self) -> str:
    return f"{self.generation}:{'x'.join(map(str, self.sizes))}"


def parse(text: str) -> Topology:
  """Reads a topology; a size more than the torus has axes is the number of slices.

  Raises:
    UserError: an unknown generation, or sizes that do not fit it.
  """
  generation, _, sizes = text.partition(":")
  if generation not in AXES:
    known = ", ".join(AXES)
    raise UserError(f"topology {text!r}: {EXPECTED}, with one of {known}")
  axes = AXES[generation]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") not in (
    axes - 1,
    axes,
  ):
    raise UserError(f"topology {text!r}: {EXPECTED}; {generation} has {axes} axes")
  numbers = [int(size) for size in sizes.split("x")]
  return Topology(generation, tuple(numbers[:axes]), math.prod(numbers[axes:]))


def mesh(topology: str, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """Returns a mesh over all chips of a topology; -1 = the chips that are left.

  Slices lie along the mesh's axis `data`. Lower a program for the mesh under
  `jax.set_mesh`, with shapes that carry shardings of this mesh; nothing may be
  computed on it, not even a constant.
  """
  return make_mesh(data, fsdp, tensor, devices=devices(topology))


def devices(topology: str) -> list[jax.Device]:
  """Returns the chips of a topology, as devices that compile only.

  Raises:
    UserError: an unknown topology, or no libtpu.
  """
  wanted = parse(topology)
  # A v4 chip is one device only where its two cores work as one.
  options = {"chip_config_name": "megacore"} if wanted.generation == "v4" else {}
  # A host has 2x2 chips, or fewer where the topology has.
  bounds = [min(2, size) for size in wanted.sizes[:2]]
  options["chips_per_host_bounds"] = [*bounds, 1]
  if wanted.slices > 1:
    options["num_slices"] = wanted.slices
  # There is no TPU whose metadata could be asked for, or that could be in use.
  alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  try:
    with _environment(alone):
      chips = topologies.get_topology_desc(wanted.slice_name, "tpu", **options).devices
  except (jax.errors.JaxRuntimeError, ImportError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    if "libtpu" in reason and "divisible" not in reason:
      reason += " (it needs the libtpu wheel: pip install 'llamagen_jax[tpu]')"
    raise UserError(f"topology {topology!r}: {reason}") from error
  return list(chips)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
  """Sets variables that libtpu reads while it loads.

  They do not stay: parallel/hosts.py takes TPU_SKIP_MDS_QUERY for a single host.
  """
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def chip(mesh: Mesh) -> Chip:
  """Returns the data sheet of a mesh's chips."""
  kind = mesh.devices.flat[0].device_kind
  if kind not in CHIPS:
    raise UserError(f"no data sheet of {kind!r}; known are {', '.join(CHIPS)}")
  return CHIPS[kind]


def num_slices(mesh: Mesh) -> int:
  """Returns how many slices the chips of a mesh come from."""
  return len({getattr(d, "slice_index", 0) for d in mesh.devices.flat})
