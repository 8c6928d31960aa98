"""Writes images with captions, from the usual kinds of files, to caption shards.

llamagen prepare-captions --source='webdataset:/data/laion/*.tar' --out=captions
llamagen prepare-captions --source=jsonl:/data/list.jsonl --image-folder=/data \\
    --caption-key=text --min-side=64 --out=captions
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
from typing import Any

from absl import logging
from etils import epath
import tqdm

from llamagen_jax.commands import arguments
from llamagen_jax.data import shards
from llamagen_jax.data.caption_files import CaptionFiles, open_files
from llamagen_jax.data.caption_records import CaptionedImage, FieldNames
from llamagen_jax.data.captions import KIND, Caption
from llamagen_jax.data.images import BadImage, ImageDecoder, SmallImage
from llamagen_jax.data.sources import ImageRecord
from llamagen_jax.data.workers import end_with_parent
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.storage import write_text

MAX_EXAMPLE = 300  # characters of a rejected record in the last message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of prepare-captions."""

  source: str = option(
    "webdataset:TARS, parquet:FILES, jsonl:FILES, coco:ANNOTATIONS.json or folder:PATH;"
    " *, ? and {00..99} stand for several files", unit="KIND:PATH",
  )  # fmt: skip
  out: str = option("caption shards to write", unit="FOLDER")
  image_folder: str = option(
    "where paths of images start; default: the folder of the list", "", unit="FOLDER"
  )
  caption_key: str = option(
    "field of the caption, where there are several", "", unit="FIELD"
  )
  short_key: str = option(
    "field of a short caption; none if not given", "", unit="FIELD"
  )
  image_key: str = option(
    "field or column of the image, or of its path", "", unit="FIELD"
  )
  min_side: int = option("smaller images are left out", 256, unit="PIXELS")
  shards: int = option("files to write of jsonl, coco, folder", 64, at_least=1)
  workers: int = option("processes; 0 = one a core", 0, at_least=0)
  hosts: int = option("how many hosts share the work", 1, at_least=1)
  host: int = option("which of them this one is, from 0", 0, at_least=0)


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "prepare-captions", argv, __doc__)
  if not 0 <= args.host < args.hosts:
    raise UserError(f"--host={args.host}: expected 0 .. {args.hosts - 1}")
  manifest = prepare(
    args.source,
    args.out,
    keys=FieldNames(args.caption_key, args.short_key, args.image_key),
    images=args.image_folder,
    min_side=args.min_side,
    shard_count=args.shards,
    workers=args.workers or os.cpu_count() or 1,
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

  Shard i holds the records of shard i of the source, so the result does not depend on
  the number of processes and hosts, and finished shards are not written again.
  """
  files = open_files(source, keys, images, shard_count)
  plan = {
    "kind": KIND,
    "source": source,
    "images": images,
    "min_side": min_side,
    **dataclasses.asdict(keys),
    "shard_count": files.shards,
  }
  folder = shards.ShardWriter(out, plan, files.shards)
  mine = [i for i in range(host, files.shards, hosts) if not folder.is_done(i)]
  work = functools.partial(_write_shard, folder, files, ImageDecoder(min_side))
  with tqdm.tqdm(total=len(mine), desc="captions", unit="shard") as bar:
    for _ in _parallel(work, mine, workers):
      bar.update()
  manifest = folder.finish(functools.partial(_totals, source, folder.folder))
  if manifest and keys.short_key and not manifest["short_captions"]:
    logging.warning("--short-key=%s: no record has that field", keys.short_key)
  return manifest


def _totals(
  source: str, folder: epath.Path, infos: list[dict[str, Any]]
) -> dict[str, Any]:
  """Returns what the manifest says of all shards; refuses to finish without records."""
  rejected = collections.Counter()
  for info in infos:
    rejected.update(info["rejected"])
  records, shorts = (sum(i[name] for i in infos) for name in ("records", "shorts"))
  if not records:
    listed = ", ".join(f"{n} {reason}" for reason, n in rejected.items()) or "empty"
    hint = "; --min-side=N takes smaller ones" * ("small images" in rejected)
    examples = _examples(folder, {*rejected})
    _clear(folder)
    raise UserError(f"{source}: not one usable record ({listed}){hint}{examples}")
  return {"records": records, "short_captions": shorts, "rejected": dict(rejected)}


def _examples(folder: epath.Path, reasons: set[str]) -> str:
  """Returns the first record that was rejected for each reason, and why."""
  found = []
  for path in sorted(folder.glob("rejected-*.txt")):
    for line in path.read_text("utf-8").splitlines():
      key, reason, detail = line.split("\t")
      if reason in reasons:
        found.append(f"; {key}: {reason}: {detail}".rstrip(": ")[:MAX_EXAMPLE])
        reasons = reasons - {reason}
    if not reasons:
      break
  return "".join(found)


def _clear(folder: epath.Path) -> None:
  """Empties a folder without records, so that the next try may have other options."""
  for pattern in ("plan.json", "shard-*.json", "*.array_record", "rejected-*.txt"):
    for path in folder.glob(pattern):
      path.unlink(missing_ok=True)


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
  folder: shards.ShardWriter, files: CaptionFiles, decoder: ImageDecoder, index: int
) -> None:
  names = {kind: folder.file_name(kind, index) for kind in ("text", "images")}
  rejected: list[str] = []
  reasons, records, shorts = collections.Counter(), 0, 0
  with (
    folder.records("text", index) as texts,
    folder.records("images", index) as images,
  ):
    for record in files.read(index):
      problem = record.problem or _problem(record, decoder)
      if problem:
        reason, _, detail = problem.partition(": ")
        reasons[reason] += 1
        fields = record.key, reason, detail
        rejected.append("\t".join(" ".join(field.split()) for field in fields))
        continue
      caption = Caption(record.key, record.caption, record.short, record.source)
      texts.write(caption.pack())
      images.write(record.image)
      records += 1
      shorts += bool(record.short)
  if rejected:
    name = f"rejected-{index:05d}-of-{files.shards:05d}.txt"
    write_text(folder.folder / name, "\n".join(rejected) + "\n")
  counts = {
    "records": records, "shorts": shorts, "rejected": dict(sorted(reasons.items())),
  }  # fmt: skip
  folder.commit(index, names, counts)


def _problem(record: CaptionedImage, decoder: ImageDecoder) -> str:
  """Returns why a record cannot be used, as "reason: detail", or ""."""
  try:
    decoder(ImageRecord(record.key, record.image))
  except BadImage as problem:
    kind = "small" if isinstance(problem, SmallImage) else "broken"
    return f"{kind} images: {str(problem).removeprefix(f'{record.key}: ')}"
  return ""
