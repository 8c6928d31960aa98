"""Encodes images to code shards, for training transformers.

Every host encodes whole shards of its own on its own chips. An image's codes are
computed by the same program wherever it lies, so the shards do not depend on the
number of hosts or chips, and a run that was killed goes on with the next shard.

llamagen extract-codes --tokenizer=vq16/bundle --source=folder:/data/images \\
    --image-size=256 --out=codes --check=8
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

from absl import logging
import grain
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import tqdm

from llamagen_jax.commands import arguments
from llamagen_jax.data.classes import shown_name
from llamagen_jax.data.codes import (
  KIND,
  CodeRecord,
  CodeShardSpec,
  CodeSource,
  CodeWriter,
  code_dtype,
)
from llamagen_jax.data.images import BadImage, CropSet, ImageDecoder
from llamagen_jax.data.own_shards import copy_hint, write_own_shards
from llamagen_jax.data.shards import verify
from llamagen_jax.data.sources import NO_LABEL, ImageRecord, Source, open_source
from llamagen_jax.data.workers import in_processes
from llamagen_jax.errors import UserError
from llamagen_jax.images import from_uint8, grid, save_png, to_uint8
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts as cluster
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sides import Sides, grid_of, height_width
from llamagen_jax.storage import user_path
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import bundle

READ_THREADS = 4
MOST_CLASSES_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class _Crops:
  """Grain transform: sample -> its crops, or why it has none."""

  crop_set: CropSet
  decoder: ImageDecoder

  def __call__(self, sample: ImageRecord) -> dict[str, Any]:
    found = {"key": sample.key, "label": sample.label, "problem": "", "crops": None}
    try:
      return found | {"crops": self.crop_set(self.decoder(sample))}
    except BadImage as problem:
      return found | {"problem": str(problem)}


class Encoder:
  """uint8 crops -> codes, on all chips of this host and no others."""

  def __init__(self, path: str | pathlib.Path):
    bundle.read_tokenizer_config(path)[0].require_codes(f"--tokenizer={path}")
    loaded = bundle.load_tokenizer(path, make_mesh())
    self.config: TokenizerConfig = loaded.config
    self.identity = loaded.identity
    mesh = Mesh(np.array(jax.local_devices()), ("chips",))
    self.chips = mesh.size
    self._rows = NamedSharding(mesh, PartitionSpec("chips"))
    # Without an fsdp axis every chip holds all parameters.
    self._params = jax.tree.map(
      lambda leaf: jax.device_put(
        leaf.addressable_data(0), NamedSharding(mesh, PartitionSpec())
      ),
      loaded.params,
    )

  def encode(self, crops: np.ndarray) -> jax.Array:
    """uint8 [B, crops, H, W, 3] -> int32 [B, crops, T]; B a multiple of `chips`."""
    return _encode(self.config, self._params, jax.device_put(crops, self._rows))

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """Codes [B, h, w] -> uint8 images [B, H, W, 3]."""
    return np.asarray(_decode(self.config, self._params, codes))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, crops_BNHWC):
  def encode(images):
    return model.encode(config, params, from_uint8(images))

  # One crop of every image at a time: the activations are large.
  codes_NBhw = jax.lax.map(encode, crops_BNHWC.swapaxes(0, 1))
  return codes_NBhw.reshape(*codes_NBhw.shape[:2], -1).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, codes_Bhw):
  return to_uint8(model.decode(config, params, codes_Bhw))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(cluster.HostOptions):
  """Options of extract-codes."""

  tokenizer: str = option("bundle of the tokenizer", unit="FOLDER")
  source: str = option(
    "images: folder:, jsonl:, arrayrecord:, captions: or tfds:", unit="KIND:PATH"
  )
  out: str = option("code shards to write", unit="FOLDER")
  image_size: Sides = option("size of the crops: SIDE or WIDTHxHEIGHT", unit="PIXELS")
  crops: str = option("crops of an image", "five", choices=("center", "five"))
  ranges: str = option(
    "crop ranges: shorter sides that crops are cut from, in image sizes", "1.1,1.05"
  )
  mirror: bool = option("take every crop mirrored, too", True)
  shards: int = option("files to write", 64, at_least=1)
  batch_size: int = option(
    "images at a time on every device", 16, unit="IMAGES", at_least=1
  )
  min_side: int = option("smaller images are bad ones", 16, unit="PIXELS")
  background: str = option("behind transparent pixels", "white", unit="COLOUR")
  ignore_exif: bool = option(
    "leave turned photographs as stored, as the published ImageNet models did", False
  )
  max_bad_share: float = option(
    "share of the images that may be bad; above it the command fails", 0.01,
    unit="SHARE",
  )  # fmt: skip
  workers: int = option("processes that decode; 0 = threads", 0, at_least=0)
  check: int = option(
    "random images whose codes are decoded, in OUT/check.png", 0, unit="IMAGES"
  )
  verify: bool = option("compare the checksums of all shards", False)


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "extract-codes", argv, __doc__)
  cluster.initialize_distributed(args)
  try:
    ranges = tuple(float(r) for r in args.ranges.split(","))
  except ValueError as error:
    raise UserError(
      f"--ranges={args.ranges}: expected numbers, such as 1.1,1.05"
    ) from error
  decoder = ImageDecoder(args.min_side, args.background, args.ignore_exif)
  crop_set = CropSet(args.image_size, args.crops, ranges, args.mirror)
  started = time.perf_counter()
  encoder, source = Encoder(args.tokenizer), open_source(args.source)
  manifest, encoded = extract(
    encoder,
    source,
    args.source,
    args.out,
    crop_set,
    shards=args.shards,
    batch_size=args.batch_size,
    decoder=decoder,
    max_bad_share=args.max_bad_share,
    workers=args.workers,
  )
  seconds = time.perf_counter() - started
  print_result(manifest, args.out, encoded / seconds, args.verify)
  if args.check and manifest is not None and jax.process_index() == 0:
    print(check(encoder, source, args.out, crop_set, args.check, decoder))


def extract(
  encoder: Encoder,
  source: Source,
  source_spec: str,
  out: str | pathlib.Path,
  crop_set: CropSet,
  *,
  shards: int,
  batch_size: int,
  decoder: ImageDecoder,
  max_bad_share: float,
  workers: int,
) -> tuple[Mapping[str, Any] | None, int]:
  """Writes the code shards of a source; finished shards are not written again.

  Bad images are left out and named in the manifest, and end the run above
  `max_bad_share` of the source.

  Returns:
    the manifest, or None where the hosts do not share a folder, and how many images
    this host went through now.
  """
  config = encoder.config
  spec = CodeShardSpec(
    tokenizer=encoder.identity,
    tokenizer_config=dataclasses.asdict(config),
    image_size=crop_set.sides,
    grid=grid_of(crop_set.sides, config.downsample),
    codebook_size=config.codebook_size,
    crops=crop_set.names,
    class_names=source.class_names,
    background=decoder.background,
    ignore_exif=decoder.ignore_exif,
    source=source_spec,
    samples=len(source),
    shards=min(shards, len(source)),
  )
  writer = CodeWriter(out, spec, max_bad_share)
  transform, encoded = _Crops(crop_set, decoder), 0

  def write(index: int, bar: tqdm.tqdm) -> None:
    nonlocal encoded
    samples, skipped = spec.shard_range(index), {}
    read = _read(source, samples, transform, workers)
    usable = _without_bad(zip(samples, read, strict=True), skipped, bar)
    batches = _batched(usable, batch_size * encoder.chips)
    records = _records(batches, encoder, batch_size * encoder.chips)
    writer.write_shard(index, records, skipped)
    encoded += len(samples)

  sizes = [len(spec.shard_range(i)) for i in range(spec.shards)]
  manifest = write_own_shards(writer.shards, sizes, write, writer.finish, unit="image")
  return manifest, encoded


def _read(source, samples: range, transform, workers: int) -> Iterator[dict[str, Any]]:
  dataset = grain.MapDataset.source(source)[samples.start : samples.stop].map(transform)
  threads = 0 if workers else READ_THREADS
  read = dataset.to_iter_dataset(grain.ReadOptions(threads, 2 * READ_THREADS))
  if workers:
    read = in_processes(read, workers, READ_THREADS)
  return iter(read)


def _without_bad(numbered, skipped: dict[int, str], bar) -> Iterator[dict[str, Any]]:
  for number, image in numbered:
    bar.update()
    if image["problem"]:
      logging.warning("skipped image %s", image["problem"])
      skipped[number] = image["problem"]
    else:
      yield image


def _batched(found, size: int) -> Iterator[list[dict[str, Any]]]:
  batch = []
  for image in found:
    batch.append(image)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _records(batches, encoder: Encoder, batch_size: int) -> Iterator[CodeRecord]:
  """Encodes batches, one ahead of what is being written."""
  pending = None
  for batch in batches:
    crops = np.stack([image["crops"] for image in batch])
    missing = batch_size - len(batch)  # a constant shape compiles once
    crops = np.pad(crops, ((0, missing), (0, 0), (0, 0), (0, 0), (0, 0)))
    encoded = encoder.encode(crops)
    if pending is not None:
      yield from _unbatch(*pending)
    pending = batch, encoded
  if pending is not None:
    yield from _unbatch(*pending)


def _unbatch(batch, codes) -> Iterator[CodeRecord]:
  for image, rows in zip(batch, np.asarray(codes), strict=False):
    yield CodeRecord(image["key"], image["label"], rows)


def print_result(
  manifest: Mapping[str, Any] | None, out: str, speed: float, checksums: bool
) -> None:
  """Prints what a folder of code shards holds, or what is left to do.

  Args:
    manifest: of the folder; None where the hosts do not share it.
    out: the folder.
    speed: images a second on this host.
    checksums: compare those of all files first.
  """
  if manifest is None:
    print(copy_hint(out))
  elif jax.process_index() == 0:
    if checksums:
      count = verify(user_path(out), KIND)
      print(f"{count} files have the checksums that were written")
    print(report(manifest, out, speed))


def report(manifest: Mapping[str, Any], out: str, speed: float) -> str:
  """What a finished folder holds, in lines for the user."""
  skipped = [why for shard in manifest["shards"] for why in shard["skipped"].values()]
  size = sum(shard["files"][KIND]["bytes"] for shard in manifest["shards"])
  codes = len(manifest["crops"]) * math.prod(height_width(manifest["grid"]))
  codes *= code_dtype(manifest["codebook_size"]).itemsize
  lines = [
    f"{manifest['records']} images x {len(manifest['crops'])} crops in {out},"
    f" {len(skipped)} skipped, {manifest['codes_used']} of"
    f" {manifest['codebook_size']} codes used, perplexity"
    f" {manifest['perplexity']:.0f}",
    f"{speed:.1f} images/s on this host, {codes} bytes of codes an image,"
    f" {size / 1e9:.3f} GB of shards",
    _classes(manifest, out),
    *(f"skipped {problem}" for problem in skipped[:MOST_CLASSES_SHOWN]),
  ]
  return "\n".join(lines)


def _classes(manifest: dict[str, Any], out: str) -> str:
  counts, names = manifest["label_counts"], manifest["class_names"]
  if list(counts) == [str(NO_LABEL)]:
    return "no labels"
  shown = [
    f"{shown_name(names, int(label))} {count}"
    for label, count in list(counts.items())[:MOST_CLASSES_SHOWN]
  ]
  if len(counts) > len(shown):
    shown.append(f".. {len(counts) - len(shown)} more in {out}/manifest.json")
  few, many = min(counts.values(), default=0), max(counts.values(), default=0)
  return f"{len(counts)} classes of {few} to {many} images: {', '.join(shown)}"


def check(
  encoder: Encoder,
  source: Source,
  out: str | pathlib.Path,
  crop_set: CropSet,
  count: int,
  decoder: ImageDecoder,
) -> str:
  """Shows random records beside the crops of the source they should be of.

  `OUT/check.png` has crops above what their stored codes decode to, with the stored
  class; in the result, how many stored codes and labels the source confirms.
  """
  codes = CodeSource(out)
  rng = np.random.default_rng(0)
  count = min(count, len(codes))
  crops, rows, labels, same_label = [], [], [], 0
  for index in sorted(rng.choice(len(codes), count, replace=False)):
    record = codes[int(index)]
    sample = source[codes.sample(int(index))]
    if sample.key != record.key:
      raise UserError(
        f"--check: the source has {sample.key} where its codes say {record.key} is"
      )
    picked = int(rng.integers(len(record.codes)))
    crops.append(crop_set(decoder(sample))[picked])
    rows.append(record.codes[picked].astype(np.int32))
    labels.append(shown_name(codes.manifest["class_names"], record.label))
    same_label += sample.label == record.label
  crops, rows = np.stack(crops), np.stack(rows)
  missing = -count % encoder.chips
  padded = np.pad(crops[:, None], ((0, missing), *((0, 0),) * 4))
  again = np.asarray(encoder.encode(padded))[:count, 0]
  decoded = encoder.decode(rows.reshape(count, *height_width(codes.grid)))
  images = np.concatenate([crops, decoded])
  sheet = grid(images, columns=count, labels=labels + [""] * count)
  path = user_path(out) / "check.png"
  save_png(path, sheet)
  return (
    f"{path}: crops above their decoded codes; {np.mean(again == rows):.1%} of the"
    f" codes and {same_label} of {count} labels are confirmed by the source"
  )
