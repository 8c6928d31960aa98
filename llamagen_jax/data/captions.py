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
import pathlib
from typing import Any

import grain

from llamagen_jax.data import shards

KIND = "captions"
# Training reads at random, and images cannot be compressed any further.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Caption:
  """A record without its image."""

  key: str
  caption: str
  short: str = ""  # a shorter caption of the same image, if there is one
  source: str = ""  # the file that the record came from

  def pack(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

  @classmethod
  def unpack(cls, record: bytes) -> "Caption":
    return cls(**json.loads(record))


class CaptionSource:
  """Random access to the captions of a finished folder; checked when opened."""

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder)
    self.manifest = shards.read_manifest(self.folder, KIND)
    self._records = grain.sources.ArrayRecordDataSource(
      shards.paths(self.folder, self.manifest, "text")
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Caption:
    return Caption.unpack(self._records[index])

  @property
  def identity(self) -> str:
    """Names the captions and their order."""
    return captions_identity(self.manifest)

  def shard_ranges(self) -> list[range]:
    """Returns the records that every shard holds."""
    ranges, start = [], 0
    for shard in self.manifest["shards"]:
      ranges.append(range(start, start + shard["records"]))
      start += shard["records"]
    return ranges


def captions_identity(manifest: dict[str, Any]) -> str:
  return "-".join(s["files"]["text"]["sha256"][:16] for s in manifest["shards"][:4])
