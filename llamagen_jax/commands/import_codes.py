"""Writes code shards of codes that others have extracted, without their images.

Reads the lines of maskgitvq.jsonl, as RAR publishes ImageNet in MaskGIT's codes, or a
folder NAME_codes of npy files beside NAME_labels, as the original LlamaGen writes
them. Lines and files that cannot be used are named, counted and left out. A run that
was killed goes on with the next shard.

llamagen import-codes --tokenizer=maskgit --source=jsonl:maskgitvq.jsonl --out=codes
llamagen import-codes --tokenizer=vq16 --source=npy:imagenet384_codes --out=codes384
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import time
from typing import Any

from absl import logging
import tqdm

from llamagen_jax.commands import arguments
from llamagen_jax.commands.extract_codes import print_result
from llamagen_jax.data.classes import imagenet_names
from llamagen_jax.data.codes import CodeRecord, CodeShardSpec, CodeWriter
from llamagen_jax.data.foreign_codes import CodeLayout, ForeignCodes, open_codes
from llamagen_jax.data.own_shards import write_own_shards
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.weights import bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(hosts.HostOptions):
  """Options of import-codes."""

  tokenizer: str = option("bundle of the tokenizer whose codes they are", unit="FOLDER")
  source: str = option("codes: jsonl:FILE or npy:FOLDER", unit="KIND:PATH")
  out: str = option("code shards to write", unit="FOLDER")
  classes: str = option(
    "what the labels mean: the 1000 classes of ImageNet in their usual order, or"
    " numbers without names", "imagenet", choices=("imagenet", "unnamed"),
  )  # fmt: skip
  shards: int = option("files to write", 64, at_least=1)
  max_bad_share: float = option(
    "share of the samples that may be bad; above it the command fails", 0.01,
    unit="SHARE",
  )  # fmt: skip
  verify: bool = option("compare the checksums of all shards", False)


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "import-codes", argv, __doc__)
  hosts.initialize_distributed(args)
  started = time.perf_counter()
  manifest, read = run(args)
  seconds = time.perf_counter() - started
  print_result(manifest, args.out, read / seconds, args.verify)


def run(args: Options) -> tuple[Mapping[str, Any] | None, int]:
  """Writes the shards that are not there yet.

  Returns:
    the manifest, or None where the hosts do not share a folder, and how many samples
    this host read now.
  """
  config, identity = bundle.read_tokenizer_config(args.tokenizer)
  config.require_codes(f"--tokenizer={args.tokenizer}")
  source = open_codes(args.source)
  names = imagenet_names() if args.classes == "imagenet" else ()
  layout = CodeLayout.of(source, config.codebook_size, len(names))
  grid = round(layout.tokens**0.5)
  spec = CodeShardSpec(
    tokenizer=identity,
    tokenizer_config=dataclasses.asdict(config),
    image_size=grid * config.downsample,
    grid=grid,
    codebook_size=config.codebook_size,
    crops=tuple(f"crop {i}" for i in range(layout.crops)),
    class_names=names,
    ignore_exif=True,  # as the published extractions read images
    source=args.source,
    samples=len(source),
    shards=min(args.shards, len(source)),
  )
  writer, count = CodeWriter(args.out, spec, args.max_bad_share), 0

  def write(index: int, bar: tqdm.tqdm) -> None:
    nonlocal count
    samples, skipped = spec.shard_range(index), {}
    writer.write_shard(index, _usable(source, samples, layout, skipped, bar), skipped)
    count += len(samples)

  lengths = [len(spec.shard_range(i)) for i in range(spec.shards)]
  manifest = write_own_shards(
    writer.shards, lengths, write, writer.finish, unit="sample"
  )
  if manifest is not None and not manifest["records"]:
    raise UserError(f"--source={args.source}: none of its samples can be used")
  return manifest, count


def _usable(
  source: ForeignCodes,
  samples: range,
  layout: CodeLayout,
  skipped: dict[int, str],
  bar: tqdm.tqdm,
) -> Iterator[CodeRecord]:
  """Yields the records that fit; names the others in the log and in `skipped`."""
  for number, found in zip(samples, source.read(samples), strict=True):
    bar.update()
    problem = layout.problem(found) if isinstance(found, CodeRecord) else str(found)
    if problem:
      logging.warning("skipped %s", problem)
      skipped[number] = problem
    else:
      yield found
