"""The sampler, compiled for a pod: prefill and every code of a batch of images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import Cache, init_cache
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import sampling_flops
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import (
  abstract_tree,
  batch_sharding,
  replicated,
  shardings,
  unbox,
)
from llamagen_jax.pod import topology
from llamagen_jax.pod.report import CompileReport, analysed
from llamagen_jax.sampling.decode import (
  DecodeInputs,
  cache_segment_ends,
  generate_codes,
)


@dataclasses.dataclass(frozen=True)
class SamplerVerdict(CompileReport):
  """All codes of a batch of images."""

  images: int  # on all chips
  codes: int  # of one image
  least_bytes: float  # of the run, on one chip: weights and cache read once a step

  @property
  def images_per_second(self) -> float:
    """On one chip, if the bottleneck resource were used to the full."""
    return self.images / self.chips / self.least_seconds

  def lines(self) -> list[str]:
    step = 1e3 * self.least_seconds / self.codes
    return [
      *super().lines(),
      f"bytes read      {self.found.bytes / self.least_bytes:.2f} x weights and"
      " the written cache once a step",
      f"at best         {step:.2f} ms a step, {self.images_per_second:.2f}"
      " images/s a chip",
    ]

  def figures(self) -> dict[str, Any]:
    return super().figures() | {
      "images": self.images,
      "codes": self.codes,
      "least_bytes": self.least_bytes,
      "images_per_second": self.images_per_second,
    }


def compile_sampler(
  config: GPTConfig, sampling: SamplingConfig, images: int, tensor: int, where: str
) -> SamplerVerdict:
  """Compiles what `sample` runs for a topology, `v5e:1x1` say.

  Args:
    config: shape of the model.
    sampling: guidance doubles the rows.
    images: drawn at once by a group of `tensor` chips.
    tensor: chips that share a model.
    where: the topology.
  """
  mesh = topology.mesh(where, -1, 1, tensor)
  batch = images * mesh.shape["data"]
  place, every = batch_sharding(mesh), replicated(mesh)
  with jax.set_mesh(mesh):
    params = abstract_params(config, mesh)
    rows = jax.eval_shape(lambda: sampling.rows(batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    condition, mask = _condition(config, batch, place)
    inputs = DecodeInputs(
      params, abstract_tree(keys, place), mask, abstract_tree(rows, every)
    )
    lowered = generate_codes.lower(config, sampling.active_filters, inputs, condition)
    found = analysed(lowered)
  guided = sampling.guidance_scale > 1
  flops = sampling_flops(config, batch, guided) / mesh.size
  least = _least_bytes(config, params, images * (2 if guided else 1), tensor)
  return SamplerVerdict(
    topology.chip(mesh), mesh.size, flops, found, batch, config.image_tokens, least
  )


def abstract_params(config: GPTConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Shapes and places of `decoding_params` on a mesh; run under `jax.set_mesh`."""
  boxed = jax.eval_shape(lambda: init_gpt(config, jax.random.key(0)))
  trained = abstract_tree(unbox(boxed), shardings(mesh, boxed))
  lay_out = jax.jit(functools.partial(decoding_params, config))
  lowered = lay_out.lower(trained)
  return abstract_tree(lowered.out_info, lowered.compile().output_shardings)


def _condition(config: GPTConfig, batch: int, place):
  c = config
  if c.condition == "class":
    return jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=place), None
  shape = (batch, c.caption_tokens, c.caption_dim)
  return (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
    jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=place),
  )


def _least_bytes(config: GPTConfig, params, rows: int, tensor: int) -> float:
  """Weights and cache, read once a step, by one chip of a group of `tensor`."""
  weights = read_bytes(params)
  total, start = 0.0, 1
  for end in cache_segment_ends(config):
    length = config.prefix_tokens + end - 1
    cache: Cache = jax.eval_shape(lambda n=length: init_cache(config, rows, n))
    total += (end - start) * (weights + bytes_of(cache)) / tensor
    start = end
  return total


def read_bytes(params: dict[str, Any]) -> int:
  """Weights that a step reads; of the table of codes it reads a few rows."""
  return bytes_of(params) - bytes_of(params["code_embedding"])


def bytes_of(tree) -> int:
  """Of all arrays, or shapes, of a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
