"""How many images a second a host decodes and crops, and the workers that feed more.

python -m benchmarks.input --source=folder:/data/imagenet/train --workers=0,1,2,4

Without a source, JPEG files of 500x375 are made first: ImageNet's usual size.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from llamagen_jax.data.images import ImageDecoder, TrainingImage
from llamagen_jax.data.loader import READ_THREADS, Stream
from llamagen_jax.data.sources import open_source


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--source", default="", help="images; made if none is given")
  add("--image-size", type=int, default=256)
  add("--batch-size", type=int, default=32)
  add("--batches", type=int, default=10, help="batches that are timed")
  add("--workers", default="0,1,2", help="numbers of processes to try; 0 = threads")
  add("--target", type=float, default=1000.0, help="images/s to feed")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    spec = args.source or f"folder:{make_images(pathlib.Path(folder), 64)}"
    source = open_source(spec)
    transform = TrainingImage(source, args.image_size, 1.25, True, ImageDecoder(16))
    print(f"{spec}, crops of {args.image_size}, {os.cpu_count()} cores")
    best, found = 0.0, {}
    for workers in (int(w) for w in args.workers.split(",")):
      stream = Stream(source, transform, args.batch_size, 0, workers, 1.0)
      speed = measure(stream, args.batches)
      name = f"{workers} workers" if workers else "threads"
      print(f"{name:>12}  {speed:8.1f} images/s", flush=True)
      if workers:
        best = max(best, speed / workers)
      found[name] = speed
    if best:
      print(
        f"{args.target:g} images/s need {np.ceil(args.target / best):.0f} workers at"
        f" {best:.1f} images/s each"
      )
    print(json.dumps({"source": spec, "images_per_second": found}))


def measure(stream: Stream, batches: int) -> float:
  """Images a second once the workers run."""
  rows = stream.host_batches(0)
  ahead = 2 * stream.workers or READ_THREADS  # batches under way at a time
  for _ in range(ahead):
    next(rows)
  batches = max(batches, 2 * ahead)
  started = time.perf_counter()
  for _ in range(batches):
    next(rows)
  return batches * stream.batch_size / (time.perf_counter() - started)


def make_images(folder: pathlib.Path, count: int) -> pathlib.Path:
  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
    image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
    image.save(folder / f"{i:03d}.jpg", quality=95)
  return folder


if __name__ == "__main__":
  main()
