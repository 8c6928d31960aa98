"""Code shards: images as the tokenizer's codes, packed for training.

A record is one image: label int32, key length uint16, key (UTF-8), codes
[crops, tokens] as uint16, or uint32 for codebooks of more than 65 536 rows, all
little-endian.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import functools
import os
import struct
from typing import Any

import numpy as np

from llamagen_jax.data import shards
from llamagen_jax.errors import UserError
from llamagen_jax.sides import Sides, as_sides
from llamagen_jax.storage import user_path

KIND = "codes"
HEADER = struct.Struct("<iH")  # label, length of the key


@dataclasses.dataclass(frozen=True)
class CodeShardSpec:
  """All that the records of a folder have in common."""

  tokenizer: str  # content hash of the tokenizer's bundle
  tokenizer_config: dict[str, Any]
  image_size: Sides  # in pixels
  grid: Sides  # in codes
  codebook_size: int
  crops: tuple[str, ...]  # names, in the order of a record's rows
  class_names: tuple[str, ...]
  source: str
  samples: int  # of the source; skipped ones included
  shards: int
  background: str = "white"  # as the images were decoded
  ignore_exif: bool = False

  def shard_range(self, index: int) -> range:
    """Returns which samples of the source a shard holds, in their order."""
    start, stop = (self.samples * i // self.shards for i in (index, index + 1))
    return range(start, stop)


def code_dtype(codebook_size: int) -> np.dtype:
  """Returns the type that codes are stored as."""
  return np.dtype("<u2" if codebook_size <= 2**16 else "<u4")


@dataclasses.dataclass(frozen=True)
class CodeRecord:
  """One image's codes, integers [crops, tokens]."""

  key: str
  label: int
  codes: np.ndarray

  def pack(self, codebook_size: int) -> bytes:
    """Returns the record's bytes."""
    key = self.key.encode()
    codes = self.codes.astype(code_dtype(codebook_size)).tobytes()
    return HEADER.pack(self.label, len(key)) + key + codes

  @staticmethod  # cloudpickle 3.1.3 cannot send a bound classmethod to a worker
  def unpack(record: bytes, crops: int, codebook_size: int) -> "CodeRecord":
    """Reads the bytes of `pack`."""
    label, length = HEADER.unpack_from(record)
    start, dtype = HEADER.size + length, code_dtype(codebook_size)
    codes = np.frombuffer(record, dtype, offset=start).reshape(crops, -1)
    return CodeRecord(record[HEADER.size : start].decode(), label, codes)


class CodeWriter:
  """Writes a folder of code shards; see `ShardWriter`."""

  def __init__(
    self, folder: str | os.PathLike, spec: CodeShardSpec, max_bad_share: float = 1.0
  ):
    """Begins a folder, or continues one.

    Args:
      folder: where the shards are to be.
      spec: what they have in common.
      max_bad_share: of the source that may be skipped, in the shards of all starts.

    Raises:
      UserError: the folder was begun with another spec, or too much is skipped there.
    """
    self.spec, self._max_bad_share = spec, max_bad_share
    plan = {"kind": KIND, **dataclasses.asdict(spec)}
    self.shards = shards.ShardWriter(folder, plan, spec.shards)
    self._skipped = {i: len(x["skipped"]) for i, x in self.shards.infos().items()}
    self._check_skipped()

  def write_shard(
    self, index: int, records: Iterable[CodeRecord], skipped: Mapping[int, str]
  ) -> None:
    """Writes one shard.

    Args:
      index: of the shard.
      records: of the samples in `spec.shard_range(index)`, in their order.
      skipped: why samples have no record, by their number in the source; read after
        the records are exhausted.

    Raises:
      UserError: too much of the source is skipped by now.
    """
    code_counts = np.zeros(self.spec.codebook_size, np.int64)
    label_counts = collections.Counter()
    with self.shards.records(KIND, index) as writer:
      for record in records:
        writer.write(record.pack(self.spec.codebook_size))
        code_counts += np.bincount(record.codes.ravel(), minlength=len(code_counts))
        label_counts[record.label] += 1
    info = {
      "records": label_counts.total(),
      "label_counts": {str(k): label_counts[k] for k in sorted(label_counts)},
      "skipped": dict(skipped),
      "code_counts": code_counts.tolist(),
    }
    self.shards.commit(index, {KIND: self.shards.file_name(KIND, index)}, info)
    self._skipped[index] = len(info["skipped"])
    self._check_skipped()

  def finish(self) -> dict[str, Any] | None:
    """Writes the manifest once all shards are there; None while some are missing.

    Raises:
      UserError: too much of the source is skipped.
    """

    def totals(infos: list[dict[str, Any]]) -> dict[str, Any]:
      self._skipped = {i: len(info["skipped"]) for i, info in enumerate(infos)}
      self._check_skipped()
      return _totals(infos)

    return self.shards.finish(totals)

  def _check_skipped(self) -> None:
    bad = sum(self._skipped.values())
    if bad > self._max_bad_share * self.spec.samples:
      raise UserError(
        f"{bad} bad images so far in {self.spec.source} (the log names them): more"
        f" than --max-bad-share={self._max_bad_share} of its {self.spec.samples}"
      )


def _totals(infos: list[dict[str, Any]]) -> dict[str, Any]:
  """Sums over the shards; their counts of codes and labels do not stay."""
  code_counts = np.sum([info.pop("code_counts") for info in infos], axis=0)
  labels = collections.Counter()
  for info in infos:
    labels.update(info.pop("label_counts"))
  return {
    "records": sum(info["records"] for info in infos),
    "label_counts": {k: labels[k] for k in sorted(labels, key=int)},
    "codes_used": int(np.count_nonzero(code_counts)),
    "perplexity": float(perplexity(code_counts)),
  }


class CodeSource:
  """Random access to a finished folder of shards; checked when it is opened."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = user_path(folder)
    self.manifest = shards.read_manifest(self.folder, KIND)
    with shards.refuse_damage(self.folder / shards.MANIFEST):
      self.crops = len(self.manifest["crops"])
      self.grid = as_sides(self.manifest["grid"], f"{self.folder}: grid")
      codebook_size = int(self.manifest["codebook_size"])
      skipped = [int(i) for x in self.manifest["shards"] for i in x["skipped"]]
    unpack = functools.partial(
      CodeRecord.unpack, crops=self.crops, codebook_size=codebook_size
    )
    self._records = shards.Records(self.folder, self.manifest, KIND, unpack)
    # So many records lie before the k-th sample that was skipped.
    self._skipped_before = np.array(skipped, np.int64) - np.arange(len(skipped))

  def __len__(self) -> int:
    return len(self._records)

  def sample(self, index: int) -> int:
    """Returns the number in the source of a record's sample."""
    return index + int(np.searchsorted(self._skipped_before, index, side="right"))

  def __getitem__(self, index: int) -> CodeRecord:
    return self._records[index]


def perplexity(code_counts: np.ndarray) -> float:
  """exp of the entropy of the codes' frequencies; K when all are used alike."""
  share = code_counts[code_counts > 0] / max(1, code_counts.sum())
  return float(np.exp(-np.sum(share * np.log(share))))
