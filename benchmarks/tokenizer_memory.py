"""Memory of the tokenizer's training step on a pod that is not here.

python -m benchmarks.tokenizer_memory --topology=v5e:4x4 --recipes published ibq

Compiles the step with both networks for the topology, stops before machine code (so
that scratch memory of kernels is not counted), and prints the bytes of a chip.
"""

import argparse
import functools
import importlib
import sys

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import batch_sharding, replicated
from llamagen_jax.pod import topology
from llamagen_jax.pod.compiler import analysed
from llamagen_jax.pod.process import run_apart
from llamagen_jax.pod.report import GIB, CompileReport
from llamagen_jax.training.recipe import build
from llamagen_jax.training.state import abstract_state
from llamagen_jax.training.tokenizer_step import (
  GanPhase,
  TokenizerRecipe,
  init_state,
  train_step,
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--topology", default="v5e:4x4")
  add("--preset", default="VQ-16")
  add("--batch-size", type=int, default=128)
  add("--recipes", nargs="*", default=["published", "vqgan-plus", "ibq"])
  args = parser.parse_args()
  print("| recipe | GiB a chip | of it arguments | compute, ms | HBM, ms | fits |")
  print("|---|---|---|---|---|---|")
  for recipe in args.recipes:
    call = f"{args.preset},recipe={recipe}", args.batch_size, args.topology
    try:
      report = run_apart(compile_step, *call, news=sys.stderr)
    except UserError as error:
      print(f"| {recipe} | {error} |", flush=True)
      continue
    times = report.seconds
    print(
      f"| {recipe} | {report.hbm / GIB:.2f} |"
      f" {report.analysis.memory.arguments / GIB:.2f} | {1e3 * times['compute']:.0f} |"
      f" {1e3 * times['HBM']:.0f} | {'yes' if report.fits else 'no'} |",
      flush=True,
    )


def compile_step(arg: str, batch_size: int, where: str) -> CompileReport:
  """Compiles the step of `configs/vq_imagenet.py:ARG` in which both networks train."""
  config = importlib.import_module("llamagen_jax.configs.vq_imagenet").get_config(arg)
  recipe = build(TokenizerRecipe, config)
  mesh = topology.mesh(where, -1, 1, 1)
  side = recipe.data.image_size
  with jax.set_mesh(mesh):
    state = abstract_state(functools.partial(init_state, recipe), mesh)
    step = jax.jit(
      functools.partial(train_step, recipe, GanPhase(True, True)),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    images = jax.ShapeDtypeStruct(
      (batch_size, side, side, 3), jnp.uint8, sharding=batch_sharding(mesh)
    )
    analysis = analysed(step.lower(state, {"image": images}), quick=True)
  slices = topology.num_slices(mesh)
  return CompileReport(topology.chip(mesh), mesh.size, slices, 0.0, analysis)


if __name__ == "__main__":
  main()
