"""Reading code shards for a transformer: start-up, memory, and images a second.

python -m benchmarks.input_codes --records=50000000 --features

One shard of random records is written and linked under the names of all others, so a
data set of any size is there at once. What a v5p-64 asks of each of its eight hosts is
computed from the FLOPs of a step, for chips that run at --mfu of their peak.
"""

import argparse
import json
import os
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np

from llamagen_jax.data.codes import CodeRecord, CodeShardSpec, CodeSource, CodeWriter
from llamagen_jax.data.features import KIND, FeatureRecord, FeatureSource
from llamagen_jax.data.loader import Stream
from llamagen_jax.data.shards import MANIFEST, ShardWriter
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.parallel.chips import CHIPS
from llamagen_jax.storage import read_json, write_json
from llamagen_jax.training.captions import PairInput, PairSource
from llamagen_jax.training.train_gpt import pick_crop

GRID, FEATURE_DIM, TOKENS = 16, 2048, 30  # of a caption of usual length
CHIPS_V5P_64, HOSTS_V5P_64 = 32, 8


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--records", type=int, default=1_281_167)
  add("--records-a-shard", type=int, default=10_000)
  add("--crops", type=int, default=1, help="crops of an image")
  add("--features", action="store_true", help="join T5 features of captions")
  add("--batch-size", type=int, default=128, help="of this host")
  add("--batches", type=int, default=20, help="batches that are timed")
  add("--workers", default="0", help="numbers of processes to try; 0 = threads")
  add("--mfu", type=float, default=0.5, help="share of the peak that the chips reach")
  add("--folder", default="", help="where to write; default: the temporary folder")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
    shards = -(-args.records // args.records_a_shard)
    folder = pathlib.Path(folder)
    write_codes(folder / "codes", shards, args.records_a_shard, args.crops)
    if args.features:
      write_features(folder / "features", shards, args.records_a_shard)
    found = {
      "records": shards * args.records_a_shard,
      "shards": shards,
      "features": args.features,
      **measure(folder, args),
    }
  for name, needed in needs(args.mfu).items():
    print(f"{name:>24}  needs {needed:8.0f} images/s of every host")
  print(json.dumps(found))


def measure(folder: pathlib.Path, args) -> dict[str, float]:
  """Returns seconds and memory of the start, and images a second afterwards."""
  before, started, used = memory(), time.perf_counter(), cpu_seconds()
  source, transform = CodeSource(folder / "codes"), pick_crop
  if args.features:
    source = PairSource(source, FeatureSource(folder / "features"))
    transform = PairInput(120, None, 0.0)
  first = Stream(source, transform, args.batch_size, 0).host_batches(0)
  next(first)
  found = {
    "start_seconds": time.perf_counter() - started,
    "start_cpu_seconds": cpu_seconds() - used,
    "start_gb": memory() - before,
  }
  print(
    f"{len(source)} records: first batch after {found['start_seconds']:.1f} s"
    f" ({found['start_cpu_seconds']:.1f} s of a core), {found['start_gb']:.2f} GB more",
    flush=True,
  )
  first.close()
  for workers in map(int, args.workers.split(",")):
    batches = Stream(source, transform, args.batch_size, 0, workers).host_batches(0)
    for _ in range(10):
      next(batches)
    started, used = time.perf_counter(), cpu_seconds()
    for _ in range(args.batches):
      next(batches)
    seconds, images = time.perf_counter() - started, args.batches * args.batch_size
    name = f"{workers} workers" if workers else "threads"
    found[name] = images / seconds
    print(f"{name:>12}  {images / seconds:8.0f} images/s", end="")
    if not workers:  # their own seconds count only once they have ended
      found["images_per_cpu_second"] = images / (cpu_seconds() - used)
      print(f", {found['images_per_cpu_second']:.0f} a second of one core", end="")
    print(f", {memory():.2f} GB in all", flush=True)
    batches.close()
  return found


def needs(mfu: float) -> dict[str, float]:
  """Returns the images a second that one of eight hosts has to read."""
  flops = CHIPS_V5P_64 * CHIPS["TPU v5p"].peak_flops * mfu / HOSTS_V5P_64
  models = {
    f"{name} at {side}": GPTConfig.preset(name, image_size=side)
    for name, side in (("B", 256), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384))
  }
  return {name: flops / train_flops(model, 1) for name, model in models.items()}


def memory() -> float:
  """Returns the largest resident memory of this process so far, in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def write_codes(folder: pathlib.Path, shards: int, records: int, crops: int) -> None:
  """Writes one shard, and links it under the names of the others."""
  spec = CodeShardSpec(
    tokenizer="random", tokenizer_config={}, image_size=16 * GRID, grid=GRID,
    codebook_size=16384, crops=tuple(map(str, range(crops))), class_names=(),
    source="random", samples=records, shards=1,
  )  # fmt: skip
  rng, writer = np.random.default_rng(0), CodeWriter(folder, spec)
  rows = (
    CodeRecord(f"{i:09d}", i % 1000, rng.integers(0, 16384, (crops, GRID**2)))
    for i in range(records)
  )
  writer.write_shard(0, rows, {})
  writer.finish()
  repeat(folder, shards)


def write_features(folder: pathlib.Path, shards: int, records: int) -> None:
  plan = {"kind": KIND, "t5": "random", "dim": FEATURE_DIM, "tokens": 120}
  writer = ShardWriter(folder, plan, 1)
  features = np.zeros((TOKENS, FEATURE_DIM), np.float32)
  with writer.records(KIND, 0) as file:
    for i in range(records):
      file.write(FeatureRecord(f"{i:09d}", features, features[:0]).pack())
  writer.commit(0, {KIND: writer.file_name(KIND, 0)}, {"records": records})
  writer.finish(lambda infos: {"records": records})
  repeat(folder, shards)


def repeat(folder: pathlib.Path, shards: int) -> None:
  """Makes a finished folder of one shard one of many, with links to the same file."""
  manifest = read_json(folder / MANIFEST)
  (shard,) = manifest["shards"]
  ((kind, file),) = shard["files"].items()
  manifest["shards"] = []
  for index in range(shards):
    name = f"{kind}-{index:05d}-of-{shards:05d}.array_record"
    os.link(folder / file["file"], folder / name)
    files = {kind: file | {"file": name}}
    manifest["shards"].append(shard | {"files": files})
  manifest["records"] = manifest["samples"] = shards * shard["records"]
  write_json(folder / MANIFEST, manifest)


if __name__ == "__main__":
  main()
