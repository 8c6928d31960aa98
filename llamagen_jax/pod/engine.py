"""The slot engine of serving, compiled for a pod: a chunk of steps of all slots."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import sampling_flops
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import abstract_tree, batch_sharding, replicated
from llamagen_jax.pod import topology
from llamagen_jax.pod.report import CompileReport, analysed
from llamagen_jax.pod.sampler import abstract_params, bytes_of, read_bytes
from llamagen_jax.sampling.slots import ChunkInputs, init_state, run_chunk
from llamagen_jax.serving.engine import state_sharding


@dataclasses.dataclass(frozen=True)
class EngineVerdict(CompileReport):
  """A chunk, with a guided image in every slot."""

  slots: int  # on all chips
  steps: int  # of the chunk
  codes: int  # of an image
  whole_bytes: float  # of the chunk, on one chip: weights and cache read once a step
  least_bytes: float  # the same, but of the cache only what is written: half of it

  @property
  def images_per_second(self) -> float:
    """On one chip, if the bottleneck resource were used to the full."""
    return self._images / self.least_seconds

  @property
  def bound(self) -> float:
    """Images a second on one chip that read the least there is to read."""
    return self._images / (self.least_bytes / self.chip.hbm_bandwidth)

  @property
  def _images(self) -> float:
    """Of one chip in a chunk."""
    return self.slots / self.chips * self.steps / self.codes

  def lines(self) -> list[str]:
    m, step = self.found.memory, 1e3 * self.least_seconds / self.steps
    return [
      *super().lines(),
      f"temporaries     {m.temporaries / m.arguments:.1%} of the arguments",
      f"bytes read      {self.found.bytes / self.whole_bytes:.2f} x weights and cache"
      f" once a step, {self.found.bytes / self.least_bytes:.2f} x weights and the"
      " written half",
      f"at best         {step:.2f} ms a step, {self.images_per_second:.2f}"
      f" images/s a chip; {self.bound:.2f} by the roofline of the latter",
    ]

  def figures(self) -> dict[str, Any]:
    names = ("slots", "steps", "codes", "whole_bytes", "least_bytes", "bound")
    return super().figures() | {
      "images_per_second": self.images_per_second,
      **{name: getattr(self, name) for name in names},
    }


def compile_engine(
  config: GPTConfig, slots: int, steps: int, tensor: int, where: str
) -> EngineVerdict:
  """Compiles a chunk of what `serve` runs for a topology, `v5e:1x1` say.

  Args:
    config: shape of the model.
    slots: of a group of `tensor` chips.
    steps: of the chunk.
    tensor: chips that share a model.
    where: the topology.
  """
  c, mesh = config, topology.mesh(where, -1, 1, tensor)
  total = slots * mesh.shape["data"]
  with jax.set_mesh(mesh):
    params = abstract_params(c, mesh)
    places = state_sharding(mesh, c, total)
    state = jax.eval_shape(functools.partial(init_state, c, total))
    state = abstract_tree(state, places)
    plan = abstract_tree(jax.eval_shape(lambda: _plan(total)), batch_sharding(mesh))
    program = jax.jit(
      functools.partial(run_chunk, c, steps),
      donate_argnums=1,
      out_shardings=(places, replicated(mesh)),
    )
    found = analysed(program.lower(params, state, plan))
  flops = sampling_flops(c, total, guidance=True) * steps / c.image_tokens / mesh.size
  weights = steps * read_bytes(params) / tensor
  cache = steps * bytes_of(state.cache) / mesh.size
  return EngineVerdict(
    topology.chip(mesh), mesh.size, flops, found, total, steps, c.image_tokens,
    weights + cache, weights + cache / 2,
  )  # fmt: skip


def _plan(slots: int) -> ChunkInputs:
  rows = 2 * slots
  keys = jnp.zeros((rows, 2), jnp.uint32)
  settings = jax.tree.map(jnp.asarray, SamplingConfig().rows(rows))
  return ChunkInputs(jnp.zeros(rows, jnp.int32), jnp.zeros(slots, bool), keys, settings)
