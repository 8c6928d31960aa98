"""Speed of sampling codes, held against the memory that a step has to read.

python -m benchmarks.decode              # GPT-B, 256 codes, 4 images, float32
python -m benchmarks.decode --preset=XL --image-size=384 --batch=32 --dtype=bfloat16
python -m benchmarks.decode --gpt=quickstart/gpt/bundle --batch=1 --windows 1 4 8 16
python -m benchmarks.decode --gpt=quickstart/gpt/bundle --batch=40 --windows 4 8 16 \\
  --guidances 1 2 4 --plot=windows.png    # forwards alone, by guidance scale

A step multiplies every weight with a few rows, so it cannot be faster than reading
the weights, and the keys and values written so far, once. That is the bound printed;
the bandwidth in it is measured in the same run.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib import pyplot
import numpy as np

from benchmarks.machine import read_bandwidth
from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import KV_CACHES, PRESETS, GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.runtime import prepare
from llamagen_jax.sampling.decode import DecodeInputs, generate, generate_codes
from llamagen_jax.sampling.keys import as_keys, image_keys
from llamagen_jax.weights import bundle


def main() -> None:
  prepare(steady=True)
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--preset", default="B", choices=PRESETS)
  add("--image-size", type=int, default=256)
  add("--batch", type=int, default=4, help="images, two rows each with guidance")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--kv-cache", default="float", choices=KV_CACHES)
  add("--guidance", type=float, default=4.0)
  add("--top-k", type=int, default=2000)
  add("--repeats", type=int, default=3)
  add("--gpt", help="bundle of a trained model, with settings of its own")
  add("--windows", type=int, nargs="+", help="compare windows instead")
  add("--guidances", type=float, nargs="+", help="count forwards, by guidance scale")
  add("--plot", help="PNG of --guidances")
  args = parser.parse_args()

  if args.gpt:
    gpt = bundle.load_gpt(args.gpt, dtype=args.dtype, kv_cache=args.kv_cache)
    config, params, sampling = gpt.config, gpt.params, gpt.sampling
  else:
    config = GPTConfig.preset(
      args.preset, image_size=args.image_size, dtype=args.dtype, kv_cache=args.kv_cache
    )
    params = random_params(config)
    sampling = SamplingConfig(guidance_scale=args.guidance, top_k=args.top_k)
  params = decoding_params(config, params)
  if args.guidances:
    count_forwards(config, params, args)
    return
  if args.windows:
    compare_windows(config, params, args.batch, sampling, args.windows, args.repeats)
    return
  filtered = SamplingConfig(guidance_scale=args.guidance, top_k=args.top_k)
  plain = SamplingConfig(guidance_scale=args.guidance, top_k=0)
  first, seconds = measure(config, params, args.batch, filtered, args.repeats)
  _, unfiltered = measure(config, params, args.batch, plain, args.repeats)

  rows = args.batch * (2 if args.guidance > 1 else 1)
  bandwidth = read_bandwidth()
  bound = bytes_read(config, params, rows) / bandwidth
  steps = config.image_tokens
  found = {
    "seconds": seconds,
    "ms_per_step": 1e3 * seconds / steps,
    "images_per_second": args.batch / seconds,
    "bound_seconds": bound,
    "share_of_bound": bound / seconds,
    "read_gb_per_second": bandwidth / 1e9,
    "top_k_share": 1 - unfiltered / seconds,
    "first_call_seconds": first,
  }
  print(
    f"GPT-{args.preset}, {steps} codes, {args.batch} images in {rows} rows,"
    f" {args.dtype}, top-k {args.top_k}, {jax.devices()[0]}"
  )
  print(f"seconds                 {seconds:8.2f}   with compilation {first:.2f}")
  print(f"milliseconds a step     {found['ms_per_step']:8.1f}")
  print(f"images a second       {found['images_per_second']:8.2f}")
  print(f"bound by memory         {bound:8.2f} s at {bandwidth / 1e9:.1f} GB/s")
  print(f"share of the bound      {found['share_of_bound']:8.0%}")
  print(f"top-k's share of a step {found['top_k_share']:8.1%}")
  print(json.dumps(found))


def compare_windows(config, params, batch, sampling, windows, repeats) -> None:
  """Prints forwards and the shortest time of every window, measured in turns."""
  labels = np.arange(batch) * 37 % config.num_classes
  keys = as_keys(image_keys(0, range(batch)))
  best, forwards, codes = {}, {}, {}
  for turn in range(repeats + 1):
    for window in windows:
      settings = dataclasses.replace(sampling, window=window)
      inputs = DecodeInputs(params, keys, None, settings.for_batch(batch))
      started = time.perf_counter()
      found = jax.block_until_ready(generate_codes(config, settings, inputs, labels))
      seconds = time.perf_counter() - started
      if turn:  # the first one compiles
        best[window] = min(seconds, best.get(window, seconds))
      codes[window], forwards[window] = map(np.asarray, found)
  print(f"{config.image_tokens} codes, {batch} images, {config.dtype}, {sampling}")
  for window in windows:
    equal = np.mean((codes[window] == codes[windows[0]]).all(axis=1))
    print(
      f"window {window:3}  forwards {forwards[window].mean():6.1f}"
      f"  ms {1e3 * best[window]:9.1f}  {best[windows[0]] / best[window]:5.2f}x"
      f"  images equal {equal:.0%}"
    )
  print(json.dumps({w: [float(forwards[w].mean()), best[w]] for w in windows}))


def count_forwards(config, params, args) -> None:
  """Prints and plots how many codes a forward yields, by guidance scale and window."""
  labels = np.arange(args.batch) * 37 % config.num_classes
  keys = as_keys(image_keys(0, range(args.batch)))
  yields = {window: [] for window in args.windows}
  for guidance in args.guidances:
    for window in args.windows:
      settings = SamplingConfig(guidance_scale=guidance, window=window)
      inputs = DecodeInputs(params, keys, None, settings.for_batch(args.batch))
      _, forwards = generate_codes(config, settings, inputs, labels)
      yields[window].append(config.image_tokens / float(np.mean(forwards)))
  for window in args.windows:
    found = "  ".join(f"{y:5.2f}" for y in yields[window])
    print(f"window {window:3}  codes a forward by guidance scale  {found}", flush=True)
  print(json.dumps({"guidances": args.guidances, "codes_per_forward": yields}))
  if args.plot:
    plot_forwards(args, yields)


def plot_forwards(args, yields: dict[int, list[float]]) -> None:
  matplotlib.use("Agg")
  figure, axis = pyplot.subplots(figsize=(5, 3.2), dpi=110)
  for window, codes in yields.items():
    axis.plot(args.guidances, codes, marker="o", label=f"window {window}")
  axis.set(xlabel="guidance scale", ylabel="codes a forward", ylim=(1, None))
  axis.grid(alpha=0.3)
  axis.legend()
  figure.tight_layout()
  figure.savefig(args.plot)


def random_params(config: GPTConfig):
  """Weights of the right shapes; their values do not change the speed."""
  shapes = jax.eval_shape(lambda key: unbox(init_gpt(config, key)), jax.random.key(0))
  rng = np.random.default_rng(0)

  def normal(shape):
    return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))

  return jax.tree.map(lambda leaf: normal(leaf.shape), shapes)


def measure(config, params, batch, sampling, repeats) -> tuple[float, float]:
  """Seconds of the first call, which compiles, and the median of the next ones."""
  labels = np.arange(batch) * 37 % config.num_classes
  times = []
  for seed in range(repeats + 1):
    started = time.perf_counter()
    jax.block_until_ready(
      generate(config, params, labels, jax.random.key(seed), sampling=sampling)
    )
    times.append(time.perf_counter() - started)
  return times[0], float(np.median(times[1:]))


def bytes_read(config: GPTConfig, params, rows: int) -> int:
  """Of the weights and of what the cache holds, once a step, over all steps."""
  used = {name: params[name] for name in ("layers", "head", "norm")}
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(used))
  c = config
  empty = jax.eval_shape(lambda: init_cache(c, rows, c.length))
  cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
  written = sum(range(c.prefix_tokens, c.prefix_tokens + c.image_tokens))
  return weights * c.image_tokens + cache * written // c.length


if __name__ == "__main__":
  main()
