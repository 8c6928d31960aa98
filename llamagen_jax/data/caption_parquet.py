"""Parquet files of images with captions."""

from collections.abc import Iterator
import dataclasses
import itertools
import os

from etils import epath

from llamagen_jax.data.caption_records import (
  CAPTION_KEYS,
  CaptionedImage,
  FieldNames,
  Unusable,
  image_of,
  listed,
  with_captions,
)
from llamagen_jax.data.sources import PATH_KEYS
from llamagen_jax.errors import UserError, first_line
from llamagen_jax.storage import failing_if_down, user_path

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "image", "picture", "img", *PATH_KEYS)


@dataclasses.dataclass(frozen=True)
class Parquets:
  """Rows with an image: its bytes, its path, or {bytes, path} as in `datasets`."""

  files: tuple[str, ...]
  keys: FieldNames
  images: str

  @classmethod
  def open(cls, files, keys: FieldNames, images: str) -> "Parquets":
    try:
      from pyarrow import ArrowException, parquet
    except ImportError as error:
      raise UserError("parquet needs pyarrow: pip install -e '.[text]'") from error
    with user_path(files[0]).open("rb") as file:
      try:
        names = parquet.ParquetFile(file).schema_arrow.names
      except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{files[0]}: not parquet ({first_line(error)})") from error
    try:
      _columns(names, keys)
    except ValueError as error:
      raise UserError(f"{files[0]}: {error}") from error
    return cls(files, keys, images)

  @property
  def shards(self) -> int:
    return len(self.files)

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    from pyarrow import ArrowException, parquet

    path, row_number = self.files[shard], itertools.count()
    name = os.path.basename(path)
    root = user_path(self.images or os.path.dirname(path) or ".")
    try:
      with failing_if_down(path), user_path(path).open("rb") as opened:
        file = parquet.ParquetFile(opened)
        column, wanted = _columns(file.schema_arrow.names, self.keys)
        for batch in file.iter_batches(batch_size=64, columns=wanted):
          for row in batch.to_pylist():
            key = str(row.get("key") or f"{name}:{next(row_number)}")
            yield from self._records(row, column, CaptionedImage(key, name), root)
    except (ArrowException, OSError, ValueError, OverflowError) as error:
      yield CaptionedImage(name, name, problem=f"broken files: {first_line(error)}")

  def _records(
    self, row: dict, column: str, record: CaptionedImage, root: epath.Path
  ) -> Iterator[CaptionedImage]:
    image = row[column]
    path = image.get("path") if isinstance(image, dict) else image
    image = image.get("bytes") if isinstance(image, dict) else image
    try:
      if not isinstance(image, bytes) or not image:
        image = image_of(root, path)
      record = dataclasses.replace(record, image=image)
      yield from with_captions(record, row, self.keys)
    except Unusable as problem:
      yield dataclasses.replace(record, problem=str(problem))


def _columns(names: list[str], keys: FieldNames) -> tuple[str, list[str] | None]:
  """Returns the column of images, and all to read; ValueError names what is missing."""
  chosen = []
  for kind, flag, key, usual in (
    ("images", "--image-key", keys.image_key, IMAGE_KEYS),
    ("captions", "--caption-key", keys.caption_key, CAPTION_KEYS),
  ):
    wanted = (key,) if key else usual
    found = [name for name in wanted if name in names]
    if not found:
      raise ValueError(
        f"no column {' or '.join(wanted)} of {kind}; its columns are {listed(names)};"
        f" {flag} names one"
      )
    chosen += found[:1] if flag == "--image-key" else found
  if keys.short_key in names:
    chosen.append(keys.short_key)
  dotted = any("." in name for name in names)  # which would select parts of columns
  wanted = [*chosen, *(["key"] if "key" in names else [])]
  return chosen[0], None if dotted else wanted
