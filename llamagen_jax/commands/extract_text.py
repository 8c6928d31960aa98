"""Encodes the captions of caption shards to shards of T5 features.

llamagen extract-text --t5=/data/flan-t5-xl --captions=captions --out=features
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from llamagen_jax.commands import arguments
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.features import BFLOAT16, KIND, FeatureRecord
from llamagen_jax.data.own_shards import copy_hint, write_own_shards
from llamagen_jax.data.shards import ShardWriter
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts as cluster
from llamagen_jax.parallel.mesh import AXES, to_global
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.text.t5 import encode
from llamagen_jax.weights.t5 import load_t5

WINDOW = 32  # batches whose captions are sorted by length before they are encoded
SHORTEST = 16  # tokens of the shortest batch; others are twice, four times .. of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(cluster.HostOptions):
  """Options of extract-text."""

  t5: str = option("T5 v1.1 or flan-T5 from Hugging Face", unit="FOLDER")
  captions: str = option("shards that prepare-captions wrote", unit="FOLDER")
  out: str = option("feature shards to write", unit="FOLDER")
  tokens: int = option("longer captions are cut", 120, unit="TOKENS", at_least=1)
  batch_size: int = option(
    "captions at a time on every host", 256, unit="CAPTIONS", at_least=1
  )
  dtype: str = option("of the encoder", "bfloat16", choices=("float32", "bfloat16"))


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "extract-text", argv, __doc__)
  cluster.initialize_distributed(args)
  manifest = extract_text(
    args.t5,
    args.captions,
    args.out,
    tokens=args.tokens,
    batch_size=args.batch_size,
    dtype=args.dtype,
  )
  if manifest is None:
    print(copy_hint(args.out))
    return
  if jax.process_index() > 0:
    return
  size = sum(s["files"][KIND]["bytes"] for s in manifest["shards"])
  records, rows = manifest["records"], manifest["rows"]
  print(
    f"{records} captions in {args.out}, {rows / records:.1f} tokens each,"
    f" {size / 1e9:.3g} GB: {size / records / 1e3:.3g} GB per million captions"
  )


def extract_text(
  t5: str | pathlib.Path,
  captions: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  tokens: int,
  batch_size: int,
  dtype: str,
) -> Mapping[str, Any] | None:
  """Writes the features of caption shards, one shard for one.

  Every host does whole shards on its own chips; finished shards are not written again.

  Returns:
    the manifest, or None where the hosts do not share a folder.
  """
  source = CaptionSource(captions)
  mesh = _local_mesh()
  encoder = load_t5(t5, dtype=dtype, mesh=mesh)
  plan = {
    "kind": KIND,
    "captions": source.identity,
    "t5": encoder.identity,
    "dim": encoder.config.dim,
    "tokens": tokens,
    "dtype": dtype,
  }
  ranges = source.shard_ranges()
  folder = ShardWriter(out, plan, len(ranges))
  batch_size = -(-batch_size // mesh.size) * mesh.size
  run = functools.partial(_encode, encoder, mesh, tokens, batch_size)

  def write(index: int, bar: tqdm.tqdm) -> None:
    _write_shard(folder, index, source, ranges[index], run, batch_size, bar)

  def totals(infos: list[dict[str, Any]]) -> dict[str, Any]:
    return {n: sum(i[n] for i in infos) for n in ("records", "rows", "empty")}

  finish = functools.partial(folder.finish, totals)
  sizes = [len(samples) for samples in ranges]
  return write_own_shards(folder, sizes, write, finish, unit="caption")


def _local_mesh() -> jax.sharding.Mesh:
  """The chips of this host, weights spread over all of them."""
  devices = np.array(jax.local_devices()).reshape(1, -1, 1)
  return jax.sharding.Mesh(devices, AXES)


def _write_shard(folder, index, source, samples, run, batch_size, bar) -> None:
  tokens = empty = 0
  size = WINDOW * batch_size
  with folder.records(KIND, index) as writer:
    for start in range(samples.start, samples.stop, size):
      window = [source[i] for i in range(start, min(start + size, samples.stop))]
      features = run([text for c in window for text in (c.caption, c.short)])
      pairs = zip(features[0::2], features[1::2], strict=True)
      for sample, (long, short) in zip(window, pairs, strict=True):
        writer.write(FeatureRecord(sample.key, long, short).pack())
        tokens += len(long) + len(short)
        empty += not len(long)
      bar.update(len(window))
  info = {"records": len(samples), "rows": tokens, "empty": empty}
  folder.commit(index, {KIND: folder.file_name(KIND, index)}, info)


def _encode(
  encoder: TextEncoder,
  mesh: jax.sharding.Mesh,
  tokens: int,
  batch_size: int,
  texts: list[str],
) -> list[np.ndarray]:
  """Features [tokens of the text, dim] of every text; short ones go together."""
  ids, masks = encoder.tokens.rows(texts, tokens)
  lengths = masks.sum(axis=1)
  features = [np.zeros((0, encoder.config.dim), BFLOAT16)] * len(texts)
  order = np.argsort(lengths, kind="stable")
  order = order[lengths[order] > 0]
  for rows, found in _batches(encoder, mesh, ids, masks, order, batch_size):
    found = np.asarray(found.astype(BFLOAT16))
    for place, row in enumerate(rows):
      features[row] = found[place, : lengths[row]]
  return features


def _batches(
  encoder, mesh, ids, masks, order, batch_size
) -> Iterator[tuple[np.ndarray, jax.Array]]:
  """(rows, their features), the next batch dispatched before one is looked at."""
  pending = None
  for start in range(0, len(order), batch_size):
    rows = order[start : start + batch_size]
    width = SHORTEST
    while width < masks[rows[-1]].sum():
      width *= 2
    width = min(width, ids.shape[1])
    filled = np.resize(rows, batch_size)  # a constant shape compiles once
    batch = to_global({"ids": ids[filled, :width], "mask": masks[filled, :width]}, mesh)
    with jax.set_mesh(mesh):
      found = encode(encoder.config, encoder.params, batch["ids"], batch["mask"])
    if pending is not None:
      yield pending
    pending = rows, found
  if pending is not None:
    yield pending
