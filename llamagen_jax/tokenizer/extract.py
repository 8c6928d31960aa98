"""`llamagen extract-codes`: pictures to code shards, for training transformers."""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from absl import logging
import grain
import jax
import numpy as np
import tqdm

from llamagen_jax import bundle
from llamagen_jax.data.codes import CodePlan, CodeRecord, CodeWriter
from llamagen_jax.data.images import BadPicture, CropSet, Sample, decode, open_source
from llamagen_jax.data.loader import to_global
from llamagen_jax.errors import UserError
from llamagen_jax.pictures import from_uint8
from llamagen_jax.tokenizer.model import VQModel
from llamagen_jax.training.mesh import make_mesh, replicated

READ_THREADS = 4


@dataclasses.dataclass(frozen=True)
class _Crops:
  """Grain transform: sample -> its crops, or why it has none."""

  crop_set: CropSet
  min_side: int

  def __call__(self, sample: Sample) -> dict[str, Any]:
    found = {"key": sample.key, "label": sample.label, "problem": "", "crops": None}
    try:
      return found | {"crops": self.crop_set(decode(sample, self.min_side))}
    except BadPicture as problem:
      return found | {"problem": str(problem)}


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser("llamagen extract-codes", description=__doc__)
  add = parser.add_argument
  add("--tokenizer", required=True, help="bundle of the tokenizer")
  add("--source", required=True, help="pictures, folder:PATH")
  add("--out", required=True, help="folder of code shards to write")
  add("--image-size", type=int, required=True, help="side of the crops in pixels")
  add("--crops", default="five", help="center or five (default)")
  add("--ranges", default="1.1,1.05", help="crop ranges (default 1.1,1.05)")
  add("--no-mirror", action="store_true", help="leave out the mirrored crops")
  add("--shards", type=int, default=64, help="files to write (default 64)")
  add("--batch-size", type=int, default=16, help="pictures a step, over all chips")
  add("--min-side", type=int, default=16, help="smaller pictures are bad ones")
  add("--max-bad-share", type=float, default=0.01, help="bad pictures that are let by")
  add("--workers", type=int, default=0, help="processes that decode; 0 = threads")
  args = parser.parse_args(argv)
  try:
    ranges = tuple(float(r) for r in args.ranges.split(","))
  except ValueError as error:
    raise UserError(
      f"--ranges={args.ranges}: expected numbers, such as 1.1,1.05"
    ) from error
  crop_set = CropSet(args.image_size, args.crops, ranges, not args.no_mirror)
  manifest = extract(
    args.tokenizer,
    args.source,
    args.out,
    crop_set,
    shards=args.shards,
    batch_size=args.batch_size,
    min_side=args.min_side,
    max_bad_share=args.max_bad_share,
    workers=args.workers,
  )
  skipped = sum(len(shard["skipped"]) for shard in manifest["shards"])
  print(
    f"{manifest['records']} pictures x {len(manifest['crops'])} crops in {args.out},"
    f" {skipped} skipped, {manifest['codes_used']} of {manifest['codebook_size']}"
    f" codes used, perplexity {manifest['perplexity']:.0f}"
  )


def extract(
  tokenizer_path: str | pathlib.Path,
  source_spec: str,
  out: str | pathlib.Path,
  crop_set: CropSet,
  *,
  shards: int,
  batch_size: int,
  min_side: int,
  max_bad_share: float,
  workers: int,
) -> dict[str, Any]:
  """Writes the code shards of a source and returns their manifest.

  Every host owns whole shards; finished ones are not done again. Bad pictures
  are left out, named in the manifest, and end the run above `max_bad_share`.
  """
  source = open_source(source_spec)
  mesh = make_mesh()
  tokenizer = bundle.load_tokenizer(tokenizer_path, mesh)
  config = tokenizer.config
  if crop_set.side % config.downsample:
    raise UserError(
      f"image size {crop_set.side} is not a multiple of the tokenizer's"
      f" downsampling {config.downsample}"
    )
  plan = CodePlan(
    tokenizer=tokenizer.identity,
    tokenizer_config=dataclasses.asdict(config),
    image_size=crop_set.side,
    grid=crop_set.side // config.downsample,
    codebook_size=config.codebook_size,
    crops=crop_set.names,
    class_names=source.class_names,
    source=source_spec,
    samples=len(source),
    shards=min(shards, len(source)),
  )
  writer = CodeWriter(out, plan)

  def encode(crops):
    return _encode(
      config, mesh, tokenizer.params, to_global({"crops": crops}, mesh)["crops"]
    )

  transform = _Crops(crop_set, min_side)
  bad = 0
  with tqdm.tqdm(
    total=len(source), desc="extract", unit="picture", dynamic_ncols=True
  ) as bar:
    for index in range(plan.shards):
      samples = plan.shard_range(index)
      if writer.is_done(index):
        bar.update(len(samples))
        continue
      skipped: list[str] = []
      pictures = _read(source, samples, transform, workers)
      batches = _batched(_without_bad(pictures, skipped, bar), batch_size)
      writer.write_shard(index, _records(batches, encode, batch_size), skipped)
      bad += len(skipped)
      if bad > max_bad_share * len(source):
        raise UserError(
          f"{bad} bad pictures so far in {source_spec} (the log names them): more"
          f" than --max-bad-share={max_bad_share} of its {len(source)}"
        )
  return writer.finish()


def _read(source, samples: range, transform, workers: int) -> Iterator[dict[str, Any]]:
  dataset = grain.MapDataset.source(source)[samples.start : samples.stop].map(transform)
  threads = 0 if workers else READ_THREADS
  pictures = dataset.to_iter_dataset(grain.ReadOptions(threads, 2 * READ_THREADS))
  if workers:
    pictures = pictures.mp_prefetch(grain.MultiprocessingOptions(workers, READ_THREADS))
  return iter(pictures)


def _without_bad(pictures, skipped: list[str], bar) -> Iterator[dict[str, Any]]:
  for picture in pictures:
    bar.update()
    if picture["problem"]:
      logging.warning("skipped picture %s", picture["problem"])
      skipped.append(picture["problem"])
    else:
      yield picture


def _batched(pictures, size: int) -> Iterator[list[dict[str, Any]]]:
  batch = []
  for picture in pictures:
    batch.append(picture)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _records(batches, encode, batch_size: int) -> Iterator[CodeRecord]:
  """Encodes batches, one ahead of what is being written."""
  pending = None
  for batch in batches:
    crops = np.stack([picture["crops"] for picture in batch])
    missing = batch_size - len(batch)  # a constant shape compiles once
    crops = np.pad(crops, ((0, missing), (0, 0), (0, 0), (0, 0), (0, 0)))
    encoded = encode(crops)
    if pending is not None:
      yield from _unbatch(*pending)
    pending = batch, encoded
  if pending is not None:
    yield from _unbatch(*pending)


def _unbatch(batch, codes) -> Iterator[CodeRecord]:
  for picture, rows in zip(batch, np.asarray(codes), strict=False):
    yield CodeRecord(picture["key"], picture["label"], rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config, mesh, params, crops):
  """uint8 crops [B, crops, S, S, 3] -> int32 codes [B, crops, T] on every chip."""
  images = from_uint8(crops.reshape(-1, *crops.shape[2:]))
  codes = VQModel(config).apply({"params": params}, images, method="encode")
  codes = codes.reshape(*crops.shape[:2], -1)
  return jax.lax.with_sharding_constraint(codes, replicated(mesh))
