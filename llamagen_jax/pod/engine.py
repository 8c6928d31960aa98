"""The slot engine of serving, compiled for a pod: a chunk of steps of all slots.

The kernel of its attention reads the blocks of the cache that a row has written, which
no compiled program shows. It declares what it reads on average where slots are spread
evenly over all stages of an image (gpt/ragged_attention.py), and that is counted.
"""

import functools

from absl import logging
import jax
import jax.numpy as jnp

from llamagen_jax.gpt.cache import cache_length
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import sampling_flops
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import abstract_tree, batch_sharding, replicated
from llamagen_jax.pod import topology
from llamagen_jax.pod.compiler import analysed
from llamagen_jax.pod.report import CompileReport
from llamagen_jax.pod.sampler import abstract_params, bytes_of, read_bytes
from llamagen_jax.sampling.slots import ChunkInputs, init_state, run_chunk
from llamagen_jax.serving.bank import state_sharding


def compile_engine(
  config: GPTConfig,
  slots: int,
  steps: int,
  tensor: int,
  where: str,
  quick: bool = False,
  *,
  window: int = 1,
) -> CompileReport:
  """Compiles a chunk of `serve`, with a guided image in every slot.

  Args:
    config: shape of the model.
    slots: of a group of `tensor` chips.
    steps: forwards of the chunk.
    tensor: chips that share a model.
    where: the topology, such as `v5e:1x1`.
    quick: stop before machine code is made.
    window: codes that a forward reads; rates are for one of them that is final.
  """
  c, mesh = config, topology.mesh(where, -1, 1, tensor)
  total = slots * mesh.shape["data"]
  with jax.set_mesh(mesh):
    logging.info("tracing the engine's chunk")
    params = abstract_params(c, mesh)
    state = jax.eval_shape(functools.partial(init_state, c, total, window, steps))
    sharding = state_sharding(mesh, state)
    state = abstract_tree(state, sharding)
    inputs = abstract_tree(jax.eval_shape(lambda: _inputs(total)), batch_sharding(mesh))
    program = jax.jit(
      functools.partial(run_chunk, c, window, steps),
      donate_argnums=1,
      out_shardings=(sharding, replicated(mesh)),
    )
    analysis = analysed(program.lower(params, state, inputs), quick)
  codes = steps * window / c.image_tokens  # that are read, as a share of an image's
  flops = sampling_flops(c, total, guidance=True) * codes / mesh.size
  report = CompileReport(
    topology.chip(mesh), mesh.size, topology.num_slices(mesh), flops, analysis
  )
  weights = steps * read_bytes(params) / tensor
  cache = steps * bytes_of(state.cache) / mesh.size
  written = cache * written_share(c.prefix_tokens - 1, cache_length(state.cache))
  images = total / mesh.size * steps / c.image_tokens
  figures = {"slots": total, "steps": steps, "window": window, "codes": c.image_tokens}
  return _with_rates(report, figures, images, weights + written)


def written_share(shortest: int, length: int) -> float:
  """Returns the written share of a cache whose rows are evenly at all stages."""
  return (shortest + length) / 2 / length


def _with_rates(
  report: CompileReport,
  figures: dict[str, int],
  images: float,
  least: float,
) -> CompileReport:
  """Adds images a second, of this program and of one that reads the least.

  Args:
    report: of the chunk.
    figures: slots on all chips, steps of the chunk, codes of an image.
    images: that one chip finishes in a chunk, on average.
    least: bytes of weights and the written part of the cache, read once a step, of one
      chip in a chunk.
  """
  memory, read = report.analysis.memory, report.analysis.bytes
  rate = images / report.least_seconds
  bound = images / (least / report.chip.hbm_bandwidth)
  step = 1e3 * report.least_seconds / figures["steps"]
  guesses = " without a right guess" if figures["window"] > 1 else ""
  rows = [
    ("temporaries", f"{memory.temporaries / memory.arguments:.1%} of the arguments"),
    (
      "bytes read",
      f"{read / least:.2f} x weights and the written part of the cache once a step,"
      " slots being evenly at all stages",
    ),
    (
      "at best",
      f"{step:.2f} ms a step, {rate:.2f} images/s a chip{guesses}; {bound:.2f} if it"
      " read no more than that",
    ),
  ]
  return report.with_more(rows, {
    **figures, "least_bytes": least, "bound": bound, "images_per_second": rate,
  })  # fmt: skip


def _inputs(slots: int) -> ChunkInputs:
  rows = 2 * slots
  keys = jnp.zeros((rows, 2), jnp.uint32)
  settings = jax.tree.map(jnp.asarray, SamplingConfig().for_batch(rows))
  return ChunkInputs(jnp.zeros(slots, bool), keys, settings)
