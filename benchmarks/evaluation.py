"""Speed and memory of what an evaluation of 50 000 images is made of.

python -m benchmarks.evaluation inception   # images a second, on all devices
python -m benchmarks.evaluation moments     # mean, covariance, Frechet distance
python -m benchmarks.evaluation manifold    # precision and recall, 10 000 x 50 000
python -m benchmarks.evaluation tpu         # Inception compiled for a TPU v5e

Features are random, 2 048 wide as Inception's. Memory is the peak of the process, and
what of it was there before the work began.
"""

import argparse
import json
import os
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import best_seconds
from llamagen_jax.evaluation.statistics import (
  Moments,
  gaussian_distance,
  precision_recall,
)
from llamagen_jax.vision.inception import (
  FEATURES,
  Inception,
  abstract_inception,
  extract_features,
)

BLOCK = 2000
# Published peaks of a TPU v5e chip: bf16 FLOP/s, and bytes a second of its memory.
V5E_FLOPS, V5E_BYTES = 197e12, 819e9
# A product of float32 at Precision.HIGHEST is six passes of bfloat16 on a TPU.
HIGHEST_PASSES = 6


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=WORK)
  parser.add_argument("--batch", type=int, default=16, help="of Inception")
  parser.add_argument("--samples", type=int, default=50_000)
  parser.add_argument("--reference", type=int, default=10_000)
  args = parser.parse_args()
  found = WORK[args.what](args)
  for name, value in found.items():
    print(f"{name:24}{value:12.5g}")
  print(json.dumps(found))


def inception(args: argparse.Namespace) -> dict[str, float]:
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), abstract_inception())
  images = np.zeros((args.batch, 256, 256, 3), np.uint8)
  seconds = best_seconds(lambda: extract_features(params, images), repeats=3)
  return {"images_per_second": args.batch / seconds, "peak_gb": peak_gb()}


def moments(args: argparse.Namespace) -> dict[str, float]:
  rng, before = np.random.default_rng(0), peak_gb()
  whole, seconds = Moments.empty(FEATURES), 0.0
  for _ in range(args.samples // BLOCK):
    block = rng.standard_normal((BLOCK, FEATURES), np.float32)
    started = time.perf_counter()
    whole.add(block)
    seconds += time.perf_counter() - started
  after = peak_gb()
  started = time.perf_counter()
  gaussian_distance(whole.gaussian, (whole.mean + 1, whole.covariance * 2))
  distance = time.perf_counter() - started
  return {
    "moments_seconds": seconds, "distance_seconds": distance, "before_gb": before,
    "moments_peak_gb": after, "distance_peak_gb": peak_gb(),
  }  # fmt: skip


def manifold(args: argparse.Namespace) -> dict[str, float]:
  rng = np.random.default_rng(0)
  reference, samples = (
    rng.standard_normal((count, FEATURES), np.float32)
    for count in (args.reference, args.samples)
  )
  before, started = peak_gb(), time.perf_counter()
  precision, recall = precision_recall(reference, samples)
  return {
    "seconds": time.perf_counter() - started, "features_gb": before,
    "peak_gb": peak_gb(), "precision": precision, "recall": recall,
  }  # fmt: skip


def tpu(args: argparse.Namespace) -> dict[str, float]:
  """Compiles for a chip that is not here; a bound, as nothing is run."""
  from jax.experimental import topologies

  # There is no TPU whose metadata could be asked for, or that could be in use.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
  place = jax.sharding.SingleDeviceSharding(topology.devices[0])
  params, images = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    (abstract_inception(),
     jax.ShapeDtypeStruct((args.batch, 256, 256, 3), jnp.uint8)),
  )  # fmt: skip
  apply = jax.jit(lambda params, images: Inception().apply({"params": params}, images))
  compiled = apply.lower(params, images).compile()
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  seconds = max(
    HIGHEST_PASSES * cost["flops"] / V5E_FLOPS, cost["bytes accessed"] / V5E_BYTES
  )
  return {
    "gflop_per_image": cost["flops"] / args.batch / 1e9,
    "gb_read_and_written": cost["bytes accessed"] / 1e9,
    "memory_gb": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9,
    "most_images_per_second": args.batch / seconds,
  }


def peak_gb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


WORK = {"inception": inception, "moments": moments, "manifold": manifold, "tpu": tpu}

if __name__ == "__main__":
  main()
