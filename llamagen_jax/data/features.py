"""Features of captions in shards: bfloat16, as many rows as the caption has tokens.

A record is: length of the key, rows of the caption, rows of the short caption, all
uint16; the key, UTF-8; the rows, bfloat16 [rows, dim], the short caption's last; all
little-endian. Records are those of the caption shards, in their order. A caption
that cleaning left nothing of has no rows.
"""

import dataclasses
import functools
import os
import struct

import ml_dtypes
import numpy as np

from llamagen_jax.data import shards
from llamagen_jax.storage import user_path

KIND = "features"
HEADER = struct.Struct("<HHH")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class FeatureRecord:
  """T5 features of one sample: bfloat16 [tokens, dim] and [short tokens, dim]."""

  key: str
  caption: np.ndarray
  short: np.ndarray

  def pack(self) -> bytes:
    key = self.key.encode()
    header = HEADER.pack(len(key), len(self.caption), len(self.short))
    rows = (np.ascontiguousarray(x, BFLOAT16) for x in (self.caption, self.short))
    return header + key + b"".join(x.tobytes() for x in rows)

  @staticmethod  # cloudpickle 3.1.3 cannot send a bound classmethod to a worker
  def unpack(record: bytes, dim: int) -> "FeatureRecord":
    key_bytes, rows, _ = HEADER.unpack_from(record)
    start = HEADER.size + key_bytes
    values = np.frombuffer(record, BFLOAT16, offset=start).reshape(-1, dim)
    key = record[HEADER.size : start].decode()
    return FeatureRecord(key, values[:rows], values[rows:])


class FeatureSource:
  """Random access to a finished folder of features; checked when it is opened."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = user_path(folder)
    self.manifest = shards.read_manifest(self.folder, KIND)
    with shards.refuse_damage(self.folder / shards.MANIFEST):
      self.dim = self.manifest["dim"]
    unpack = functools.partial(FeatureRecord.unpack, dim=self.dim)
    self._records = shards.Records(self.folder, self.manifest, KIND, unpack)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> FeatureRecord:
    return self._records[index]
