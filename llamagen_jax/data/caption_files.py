"""Files that images with captions come in, read shard by shard.

A shard is read by one process from front to back: a tar, a parquet file, or a part of
a list. A record that cannot be used has a `problem`; it never ends the reading.
"""

from collections.abc import Iterator
from typing import Protocol

from llamagen_jax.data.caption_lists import Coco, JsonLines, PairedFiles
from llamagen_jax.data.caption_parquet import Parquets
from llamagen_jax.data.caption_records import CaptionedImage, FieldNames
from llamagen_jax.data.caption_tars import Tars
from llamagen_jax.data.file_names import expand_files
from llamagen_jax.errors import UserError

KINDS = "webdataset:, parquet:, jsonl:, coco: or folder:"


class CaptionFiles(Protocol):
  """A picklable reader of a source with a fixed number of shards."""

  shards: int

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    """Reads the records of a shard, in their order."""


def open_files(spec: str, keys: FieldNames, images: str, shards: int) -> CaptionFiles:
  """Opens `kind:path`.

  Args:
    spec: such as webdataset:TARS; see KINDS.
    keys: names of fields.
    images: folder that relative paths of images start in; default: the list's own.
    shards: for the kinds that have no files to go by.
  """
  kind, _, path = spec.partition(":")
  if kind not in ("webdataset", "parquet", "jsonl", "coco", "folder") or not path:
    raise UserError(f"--source={spec}: expected {KINDS}PATH")
  if kind == "folder":
    return PairedFiles.open(path, shards)
  files = expand_files(f"--source={spec}", path)
  if kind == "webdataset":
    return Tars(files, keys)
  if kind == "parquet":
    return Parquets.open(files, keys, images)
  if kind == "jsonl":
    return JsonLines.open(files, keys, images, shards)
  return Coco.open(files, images, shards)
