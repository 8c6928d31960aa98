"""One training step of the full-size tokenizer with its discriminator.

python -m benchmarks.tokenizer_step --preset=VQ-16 --image-size=256 --batch-size=2

Prints memory and FLOPs of the compiled programs before and after the discriminator
starts, then runs the later one.
"""

import argparse
import dataclasses
import functools
import importlib
import time

import jax
import numpy as np

from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training.recipe import build
from llamagen_jax.training.tokenizer_step import (
  GanPhase,
  TokenizerRecipe,
  init_state,
  train_step,
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--preset", default="VQ-16")
  add("--image-size", type=int, default=256)
  add("--batch-size", type=int, default=2)
  add("--dtype", default="float32", help="of activations")
  add("--perceptual", action="store_true", help="with LPIPS (of random weights)")
  args = parser.parse_args()
  metrics = run(
    args.preset, args.image_size, args.batch_size, args.dtype, args.perceptual
  )
  print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
  assert np.isfinite(list(metrics.values())).all()


def run(preset, image_size, batch_size, dtype, perceptual) -> dict[str, float]:
  config = importlib.import_module("llamagen_jax.configs.vq_imagenet").get_config(
    preset
  )
  config.model.dtype = config.discriminator.dtype = dtype
  config.loss.perceptual_weight = 1.0 if perceptual else 0.0
  config.data.update(image_size=image_size, batch_size=batch_size)
  recipe = build(TokenizerRecipe, config)
  recipe = dataclasses.replace(
    recipe, optimizer=dataclasses.replace(recipe.optimizer, ema=0.0)
  )
  state = jax.jit(lambda key: unbox(init_state(recipe, key)))(jax.random.key(0))
  rng = np.random.default_rng(0)
  shape = (batch_size, image_size, image_size, 3)
  batch = {"image": rng.integers(0, 256, shape, np.uint8)}
  for name, stage in (("before", GanPhase()), ("after", GanPhase(True, True))):
    step = jax.jit(functools.partial(train_step, recipe, stage), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    print(
      f"{name} disc_start: {compiled.cost_analysis()['flops'] / batch_size / 1e9:.0f}"
      f" GFLOP an image, {total / 2**30:.2f} GiB"
      f" ({memory.temp_size_in_bytes / 2**30 / batch_size:.2f} GiB an image on top of"
      f" {memory.argument_size_in_bytes / 2**30:.2f} GiB of state)",
      flush=True,
    )
  started = time.perf_counter()
  state, metrics = compiled(state, batch)
  metrics = {name: float(value) for name, value in metrics.items()}
  print(f"one step: {time.perf_counter() - started:.1f} s")
  return metrics


if __name__ == "__main__":
  main()
