"""Caption shards: images with their captions.

A record is a key, an image file, a caption, a short caption or "", and the file that it
came from. A folder holds, for every shard, two ArrayRecord files with the same records
in the same order, so that captions can be read without images:

  text-*    JSON {"key", "caption", "short", "source"}, UTF-8
  images-*  the image's file, unchanged: JPEG, PNG, WebP ..

`rejected-*.txt` lists the records that cannot be used: key, reason and detail, a tab
between them. The manifest counts both.
"""

import dataclasses
import json
import os

from llamagen_jax.data import shards
from llamagen_jax.storage import user_path

KIND = "captions"


@dataclasses.dataclass(frozen=True)
class Caption:
  """A record without its image."""

  key: str
  caption: str
  short: str = ""  # a shorter caption of the same image, if there is one
  source: str = ""  # the file that the record came from

  def pack(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

  @staticmethod  # cloudpickle 3.1.3 cannot send a bound classmethod to a worker
  def unpack(record: bytes) -> "Caption":
    return Caption(**json.loads(record))


class CaptionSource:
  """Random access to the captions of a finished folder; checked when opened."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = user_path(folder)
    self.manifest = shards.read_manifest(self.folder, KIND)
    self._records = shards.Records(self.folder, self.manifest, "text", Caption.unpack)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Caption:
    return self._records[index]

  @property
  def identity(self) -> str:
    """Checksum of the captions of all shards, in their order."""
    with shards.refuse_damage(self.folder / shards.MANIFEST):
      return shards.identity(self.manifest, "text")

  def shard_ranges(self) -> list[range]:
    """Returns the records that every shard holds."""
    ranges, start = [], 0
    for shard in self.manifest["shards"]:
      ranges.append(range(start, start + shard["records"]))
      start += shard["records"]
    return ranges
