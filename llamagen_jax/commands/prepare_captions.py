"""`llamagen prepare-captions`: images with captions, from anywhere, to shards."""

import argparse
import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
import tqdm

from llamagen_jax.data import shards
from llamagen_jax.data.caption_files import (
  CaptionFiles,
  FieldNames,
  RawSample,
  open_files,
)
from llamagen_jax.data.captions import KIND, WRITER_OPTIONS, Caption
from llamagen_jax.data.images import BadImage, decode
from llamagen_jax.data.sources import ImageRecord
from llamagen_jax.data.workers import end_with_parent
from llamagen_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser("llamagen prepare-captions", description=__doc__)
  add = parser.add_argument
  add(
    "--source",
    required=True,
    help="webdataset:TARS, parquet:FILES, jsonl:FILES, coco:ANNOTATIONS.json or"
    " folder:PATH; * and ? stand for several files",
  )
  add("--out", required=True, help="folder of caption shards to write")
  add("--images", default="", help="folder that paths of jsonl and coco start in")
  add("--caption-key", default="", help="field of the caption, where there are several")
  add("--short-key", default="", help="field of a short caption; none if not given")
  add("--image-key", default="", help="parquet: column of the image's bytes")
  add("--min-side", type=int, default=256, help="smaller images are left out")
  add("--shards", type=int, default=64, help="files to write of jsonl, coco, folder")
  add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
  add("--hosts", type=int, default=1, help="machines that share the work")
  add("--host", type=int, default=0, help="which of them this one is, from 0")
  args = parser.parse_args(argv)
  if not 0 <= args.host < args.hosts:
    raise UserError(f"--host={args.host}: expected 0 .. {args.hosts - 1}")
  manifest = prepare(
    args.source,
    args.out,
    keys=FieldNames(args.caption_key, args.short_key, args.image_key),
    images=args.images,
    min_side=args.min_side,
    shard_count=args.shards,
    workers=args.workers,
    hosts=args.hosts,
    host=args.host,
  )
  if manifest is None:
    print(f"this host's shards are in {args.out}; other hosts have not finished")
    return
  rejected = "".join(f"; {n} {reason}" for reason, n in manifest["rejected"].items())
  print(f"{manifest['records']} images with captions in {args.out}{rejected}")


def prepare(
  source: str,
  out: str | pathlib.Path,
  *,
  keys: FieldNames,
  images: str,
  min_side: int,
  shard_count: int,
  workers: int,
  hosts: int = 1,
  host: int = 0,
) -> dict[str, Any] | None:
  """Writes caption shards; returns the manifest, or None while others still write.

  Shard i holds what piece i of the source holds, so the result does not depend on
  the number of processes and hosts, and finished shards are not done again.
  """
  files = open_files(source, keys, images, shard_count)
  plan = {
    "kind": KIND,
    "source": source,
    "images": images,
    "min_side": min_side,
    **dataclasses.asdict(keys),
    "pieces": files.pieces,
  }
  folder = shards.ShardWriter(out, plan, files.pieces)
  mine = [i for i in range(host, files.pieces, hosts) if not folder.is_done(i)]
  work = functools.partial(_write_shard, folder, files, min_side)
  with tqdm.tqdm(total=len(mine), desc="captions", unit="shard") as bar:
    for _ in _parallel(work, mine, workers):
      bar.update()
  return folder.finish(functools.partial(_totals, source))


def _totals(source: str, infos: list[dict[str, Any]]) -> dict[str, Any]:
  rejected = collections.Counter()
  for info in infos:
    rejected.update(info["rejected"])
  records = sum(info["records"] for info in infos)
  if not records:
    listed = ", ".join(f"{n} {reason}" for reason, n in rejected.items()) or "empty"
    raise UserError(f"{source}: not one usable sample ({listed})")
  return {"records": records, "rejected": dict(rejected)}


def _parallel(work, indices: list[int], workers: int) -> Iterator[Any]:
  if workers <= 1 or len(indices) <= 1:
    yield from map(work, indices)
    return
  context = multiprocessing.get_context("spawn")  # threads of JAX do not fork
  count = min(workers, len(indices))
  with concurrent.futures.ProcessPoolExecutor(count, context, end_with_parent) as pool:
    for done in concurrent.futures.as_completed(pool.submit(work, i) for i in indices):
      yield done.result()


def _write_shard(
  folder: shards.ShardWriter, files: CaptionFiles, min_side: int, index: int
) -> None:
  names = {kind: folder.file_name(kind, index) for kind in ("text", "images")}
  writers = {
    kind: array_record_module.ArrayRecordWriter(str(folder.part(n)), WRITER_OPTIONS)
    for kind, n in names.items()
  }
  rejected: list[str] = []
  reasons, records = collections.Counter(), 0
  for sample in files.read(index):
    problem = sample.problem or _problem(sample, min_side)
    if problem:
      reason, _, detail = problem.partition(": ")
      reasons[reason] += 1
      rejected.append(f"{sample.key}\t{reason}\t{detail}".replace("\n", " "))
      continue
    caption = Caption(sample.key, sample.caption, sample.short, sample.source)
    writers["text"].write(caption.pack())
    writers["images"].write(sample.image)
    records += 1
  for writer in writers.values():
    writer.close()
  if rejected:
    part = folder.part(f"rejected-{index:05d}.txt")
    part.write_text("\n".join(rejected) + "\n")
    part.rename(folder.folder / f"rejected-{index:05d}-of-{files.pieces:05d}.txt")
  counts = {"records": records, "rejected": dict(sorted(reasons.items()))}
  folder.commit(index, names, counts)


def _problem(sample: RawSample, min_side: int) -> str:
  """Why a sample cannot be used, as "reason: detail", or ""."""
  if not sample.caption.strip():
    return "empty captions"
  try:
    decode(ImageRecord(sample.key, sample.image), min_side)
  except BadImage as problem:
    detail = str(problem).removeprefix(f"{sample.key}: ")
    small = detail.endswith(f"smaller than {min_side}")
    return f"{'small' if small else 'broken'} images: {detail}"
  return ""
