"""The sampler, compiled for a pod: prefill and every code of a batch of images."""

import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
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
from llamagen_jax.pod.compiler import analysed
from llamagen_jax.pod.report import CompileReport
from llamagen_jax.sampling.decode import (
  DecodeInputs,
  cache_segment_ends,
  decode_codes,
)


def compile_sampler(
  config: GPTConfig,
  sampling: SamplingConfig,
  images: int,
  tensor: int,
  where: str,
  quick: bool = False,
) -> CompileReport:
  """Compiles the program of `sample` for a topology such as `v5e:1x1`.

  Args:
    config: shape of the model.
    sampling: guidance doubles the rows.
    images: sampled at once by a group of `tensor` chips.
    tensor: chips that share a model.
    where: the topology.
    quick: stop before machine code is made.

  Raises:
    UserError: decoding in windows, whose number of forwards only the images decide.
  """
  if sampling.window > 1:
    raise UserError(
      f"sampling.window={sampling.window}: expected 1 for compile-for-pod"
    )
  mesh = topology.mesh(where, -1, 1, tensor)
  batch = images * mesh.shape["data"]
  split, whole = batch_sharding(mesh), replicated(mesh)
  with jax.set_mesh(mesh):
    logging.info("tracing the sampler")
    params = abstract_params(config, mesh)
    settings = jax.eval_shape(lambda: sampling.for_batch(batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    condition, mask = _condition(config, batch, split)
    inputs = DecodeInputs(
      params, abstract_tree(keys, split), mask, abstract_tree(settings, whole)
    )
    order = None
    if sampling.order == "random":
      shape = (batch, config.image_tokens)
      order = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    lowered = decode_codes.lower(
      config, sampling.active_filters, inputs, condition, order
    )
    analysis = analysed(lowered, quick)
  guided = sampling.active_filters.guidance
  flops = sampling_flops(config, batch, guided) / mesh.size
  report = CompileReport(
    topology.chip(mesh), mesh.size, topology.num_slices(mesh), flops, analysis
  )
  least = _least_bytes(config, params, images * (2 if guided else 1), tensor)
  return _with_rate(report, batch, config.image_tokens, least)


def _with_rate(
  report: CompileReport, images: int, codes: int, least_bytes: float
) -> CompileReport:
  """Adds the images a second.

  Args:
    report: of the program.
    images: on all chips.
    codes: of one image.
    least_bytes: of the run, on one chip: weights and cache read once a step.
  """
  step = 1e3 * report.least_seconds / codes
  rate = images / report.chips / report.least_seconds
  share = report.analysis.bytes / least_bytes
  rows = [
    ("bytes read", f"{share:.2f} x weights and the written cache once a step"),
    ("at best", f"{step:.2f} ms a step, {rate:.2f} images/s a chip"),
  ]
  figures = {
    "images": images, "codes": codes, "least_bytes": least_bytes,
    "images_per_second": rate,
  }  # fmt: skip
  return report.with_more(rows, figures)


def abstract_params(config: GPTConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns the shapes of `decoding_params` on a mesh; run under `jax.set_mesh`."""
  boxed = jax.eval_shape(lambda: init_gpt(config, jax.random.key(0)))
  trained = abstract_tree(unbox(boxed), shardings(mesh, boxed))
  lay_out = jax.jit(functools.partial(decoding_params, config))
  lowered = lay_out.lower(trained)
  return abstract_tree(lowered.out_info, lowered.compile().output_shardings)


def _condition(config: GPTConfig, batch: int, sharding: jax.NamedSharding):
  c = config
  if c.condition == "class":
    return jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding), None
  shape = (batch, c.caption_tokens, c.caption_dim)
  return (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
    jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=sharding),
  )


def _least_bytes(config: GPTConfig, params, rows: int, tensor: int) -> float:
  """Returns the bytes of weights and cache, read once a step, of one chip."""
  weights = read_bytes(params)
  total, start = 0.0, 1
  for end in cache_segment_ends(config):
    length = config.prefix_tokens + end - 1
    cache: Cache = jax.eval_shape(lambda n=length: init_cache(config, rows, n))
    total += (end - start) * (weights + bytes_of(cache)) / tensor
    start = end
  return total


def read_bytes(params: dict[str, Any]) -> int:
  """Returns the bytes of weights that a step reads: all but the table of codes."""
  return bytes_of(params) - bytes_of(params["code_embedding"])


def bytes_of(tree) -> int:
  """Returns the bytes of all arrays, or shapes, of a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
