"""What this machine can do at best: the bounds that benchmarks are held against.

python -m benchmarks.machine

Measured on all devices that JAX sees, the best of a few repetitions.
"""

from collections.abc import Callable
import json
import time

import jax
import jax.numpy as jnp

MATMULS = ((2048, 2048, 2048), (2048, 768, 4096), (4096, 4096, 4096))
READ_BYTES = 2**29  # far larger than any cache


def main() -> None:
  found = {
    "device": str(jax.devices()[0]),
    "matmul_gflops": matmul_peak("float32") / 1e9,
    "read_gb_per_second": read_bandwidth() / 1e9,
  }
  print(f"matmul, float32  {found['matmul_gflops']:8.1f} GFLOP/s")
  print(f"reading memory   {found['read_gb_per_second']:8.1f} GB/s")
  print(json.dumps(found))


def best_seconds(run: Callable[[], jax.Array], repeats: int = 5) -> float:
  """Shortest time of `run`, after a first call that compiles it."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - started)
  return min(times)


def matmul_peak(dtype: str) -> float:
  """FLOP/s of the fastest of a few big matmuls."""
  matmul = jax.jit(jnp.matmul)

  def speed(m: int, k: int, n: int) -> float:
    a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    return 2 * m * k * n / best_seconds(lambda: matmul(a, b))

  return max(speed(*shape) for shape in MATMULS)


def read_bandwidth() -> float:
  """Bytes a second of reading float32 once: a matrix times a few vectors."""
  matrix = jnp.ones((READ_BYTES // 4 // 4096, 4096), jnp.float32)
  rows = jnp.ones((8, 4096), jnp.float32)
  product = jax.jit(lambda matrix, rows: jnp.einsum("nd,bd->nb", matrix, rows))
  total = jax.jit(jnp.sum)
  seconds = min(
    best_seconds(lambda: product(matrix, rows)), best_seconds(lambda: total(matrix))
  )
  return READ_BYTES / seconds


if __name__ == "__main__":
  main()
