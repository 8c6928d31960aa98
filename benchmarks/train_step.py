"""Seconds of a transformer's train step against the machine's own matmul speed.

python -m benchmarks.train_step                 # GPT-B, 256 codes, batch 8, float32
python -m benchmarks.train_step --preset=L --batch=4 --dtype=bfloat16

The FLOPs are the model's: 6 a weight and code, and 12 * layers * dim * codes for
attention's two matmuls, the masked half included. What rematerialisation or the
compiler adds does not count. The peak is the best of a few big matmuls, measured
before and after.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import matmul_peak
from benchmarks.operations import seconds_by_operation
from llamagen_jax.gpt.config import PRESETS, GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.runtime import prepare
from llamagen_jax.training import gpt_step
from llamagen_jax.training.optimizer import OptimizerConfig
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from llamagen_jax.training.state import abstract_state, init_state


def main() -> None:
  prepare()
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--preset", default="B", choices=PRESETS)
  add("--image-size", type=int, default=256)
  add("--batch", type=int, default=8)
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--remat", default="none", choices=("none", "dots", "full"))
  add("--steps", type=int, default=3)
  add(
    "--profile",
    type=pathlib.Path,
    metavar="FOLDER",
    help="print where the last step's time goes; keep its trace here, for XProf",
  )
  args = parser.parse_args()

  config = GPTConfig.preset(
    args.preset, image_size=args.image_size, dtype=args.dtype, remat=args.remat
  )
  before = matmul_peak(args.dtype)
  seconds = step_seconds(config, args.batch, args.steps, args.profile)
  peak = max(before, matmul_peak(args.dtype))
  speed = train_flops(config, args.batch) / seconds
  print(f"GPT-{args.preset}, {config.image_tokens} codes, batch {args.batch},")
  print(f"{args.dtype}, remat {args.remat}, {jax.device_count()} x {jax.devices()[0]}")
  print(f"step                 {seconds:8.2f} s")
  print(f"model FLOPs          {speed / 1e9:8.1f} GFLOP/s")
  print(f"matmul peak          {peak / 1e9:8.1f} GFLOP/s")
  print(f"share of the peak    {speed / peak:8.1%}")
  figures = {"seconds": seconds, "gflops": speed / 1e9, "peak_gflops": peak / 1e9}
  print(json.dumps(vars(args) | figures | {"share": speed / peak}, default=str))


def step_seconds(
  config: GPTConfig, batch: int, steps: int, profile: pathlib.Path | None
):
  """Returns the median of the steps after the first; prints the last one's profile."""
  recipe = gpt_step.GPTRecipe(
    model=config,
    data=gpt_step.CodeData("", "", batch),
    optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.05),
    sampling=SamplingConfig(),
    mesh=MeshConfig(),
    run=RunConfig(10, 0, 1, 0, 10, 1, 0),
  )
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    init = functools.partial(gpt_step.init_state, recipe)
    abstract = abstract_state(init, mesh)
    state = init_state(init, jax.random.key(0), abstract)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.vocab_size, (batch, config.image_tokens))
    data = {
      "codes": jnp.asarray(codes, jnp.int32),
      "label": jnp.asarray(rng.integers(0, config.num_classes, batch), jnp.int32),
    }
    step = jax.jit(functools.partial(gpt_step.train_step, recipe), donate_argnums=0)
    step = step.lower(state, data).compile()
    times = []
    for i in range(steps + 1):
      if profile and i == steps:
        jax.profiler.start_trace(profile)
      started = time.perf_counter()
      state, metrics = step(state, data)
      float(metrics["loss"])
      times.append(time.perf_counter() - started)
    if profile:
      jax.profiler.stop_trace()
      for operation, seconds in seconds_by_operation(profile, step.as_text())[:30]:
        print(f"{seconds:8.3f} s  {operation}")
  return float(np.median(times[1:]))


if __name__ == "__main__":
  main()
