"""Seconds that a tokenizer takes for a few images, against the matmul speed.

python -m benchmarks.tokenizer                  # VQ-16, 8 images of 256x256, float32
python -m benchmarks.tokenizer --preset=VQ-8 --image-size=384 --batch=2
"""

import argparse
import json

import jax
import jax.numpy as jnp

from benchmarks.machine import best_seconds, matmul_peak
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.runtime import prepare
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import PRESETS, TokenizerConfig


def main() -> None:
  prepare()
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--preset", default="VQ-16", choices=PRESETS)
  add("--image-size", type=int, default=256)
  add("--batch", type=int, default=8)
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--repeats", type=int, default=3)
  args = parser.parse_args()

  config = TokenizerConfig.preset(args.preset, dtype=args.dtype)
  params = jax.jit(lambda key: unbox(model.init_tokenizer(config, key)))(
    jax.random.key(0)
  )
  side = args.image_size // config.downsample
  codes = jax.random.randint(
    jax.random.key(1), (args.batch, side, side), 0, config.codebook_size
  )
  images = jnp.zeros((args.batch, args.image_size, args.image_size, 3))
  peak = matmul_peak(args.dtype)
  found = {"peak_gflops": peak / 1e9}
  print(f"{args.preset}, {args.batch} images of {args.image_size}, {args.dtype}")
  for name, function, x in (
    ("decode", model.decode, codes),
    ("encode", model.encode, images),
  ):
    run = jax.jit(function, static_argnums=0)
    seconds = best_seconds(lambda run=run, x=x: run(config, params, x), args.repeats)
    speed = flops(config, params, name, x[:1]) * args.batch / seconds
    print(
      f"{name}  {seconds:6.2f} s, {seconds / args.batch:.2f} s an image,"
      f" {speed / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s ({speed / peak:.0%})"
    )
    found |= {f"{name}_seconds": seconds, f"{name}_gflops": speed / 1e9}
  print(json.dumps(vars(args) | found))


def flops(config: TokenizerConfig, params, method: str, one) -> float:
  """Of one image, as the compiler counts them."""
  vq = model.VQModel(config)
  program = jax.jit(lambda p, x: vq.apply({"params": p}, x, method=method))
  return program.lower(params, one).cost_analysis()["flops"]


if __name__ == "__main__":
  main()
