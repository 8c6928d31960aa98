"""Sources of images: folders, lists of files, ArrayRecord, caption shards, TFDS.

A source is a random-access sequence of samples, read by Grain's workers.
"""

import dataclasses
import glob
import json
import os
import pathlib
import struct
from typing import Protocol

from absl import logging
import grain
import numpy as np

from llamagen_jax.data import shards
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class ImageRecord:
  """An encoded image as it lies in its source."""

  key: str  # names the sample in logs and in code shards
  image: bytes
  label: int = NO_LABEL


class Source(Protocol):
  """What Grain reads; `class_names` is empty for unlabelled images."""

  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> ImageRecord: ...


def open_source(spec: str) -> Source:
  """Opens `kind:place`: folder:, jsonl:, arrayrecord:, captions: or tfds:NAME/SPLIT."""
  kinds = {
    "folder": FolderSource,
    "jsonl": JsonlSource,
    "arrayrecord": ArrayRecordSource,
    "captions": CaptionImageSource,
    "tfds": TfdsSource,
  }
  kind, _, place = spec.partition(":")
  if kind not in kinds or not place:
    raise UserError(
      f"data source {spec!r}: expected folder:PATH, jsonl:FILE, arrayrecord:FILES,"
      " captions:PATH or tfds:NAME[/SPLIT]"
    )
  return kinds[kind](place)


class FolderSource:
  """A folder of folders of images; a class is a folder, in sorted order.

  A folder that holds images itself is a source without labels.
  """

  def __init__(self, root: str):
    self.root = root
    if not os.path.isdir(root):
      raise UserError(f"data source folder:{root}: no such folder")
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir())
    self.class_names = tuple(folders)
    self._files: list[tuple[str, int]] = [
      (f"{folder}/{name}", label)
      for label, folder in enumerate(folders)
      for name in _images_in(os.path.join(root, folder))
    ]
    if not folders:
      self._files = [(name, NO_LABEL) for name in _images_in(root)]
    if not self._files:
      raise UserError(
        f"data source folder:{root}: no images ({', '.join(SUFFIXES)}) in it or"
        " in its folders"
      )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> ImageRecord:
    key, label = self._files[index]
    return ImageRecord(key, read_image(pathlib.Path(self.root, key)), label)


def read_image(path: pathlib.Path) -> bytes:
  """An image's file; nothing where it cannot be read, which `decode` reports."""
  try:
    return path.read_bytes()
  except OSError as error:
    logging.warning("image %s: %s", path, error.strerror)
    return b""


def _images_in(folder: str) -> list[str]:
  return sorted(
    entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES)
  )


HEADER = struct.Struct("<iH")  # label, length of the key


class JsonlSource:
  """Lines of JSON with `image_path`, and `label` (an integer) where there are any.

  Paths are relative to the file. Only the offsets of the lines are kept in memory,
  so a list of fifty million images opens as well.
  """

  class_names: tuple[str, ...] = ()

  def __init__(self, place: str):
    self._path = pathlib.Path(place)
    if not self._path.is_file():
      raise UserError(f"data source jsonl:{place}: no such file")
    self._offsets = _line_offsets(self._path)
    if len(self) == 0:
      raise UserError(f"data source jsonl:{place}: no lines in it")

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    start, stop = (int(x) for x in self._offsets[index : index + 2])
    with self._path.open("rb") as file:
      file.seek(start)
      line = file.read(stop - start)
    try:
      fields = json.loads(line)
      name, label = fields["image_path"], fields.get("label", NO_LABEL)
      if not isinstance(name, str) or not isinstance(label, int):
        raise TypeError("image_path must be text and label an integer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"{self._path}: line at byte {start}: expected an object with image_path and"
        f" perhaps label, found {line[:80]!r} ({error})"
      ) from error
    return ImageRecord(name, read_image(self._path.parent / name), label)


def _line_offsets(path: pathlib.Path) -> np.ndarray:
  """Where every line that is not blank starts, and the end of the file."""
  offsets, position = [], 0
  with path.open("rb") as file:
    for line in file:
      if line.strip():
        offsets.append(position)
      position += len(line)
  return np.array([*offsets, position], np.int64)


class ArrayRecordSource:
  """ArrayRecord files of `pack_image`'s records; `*` stands for several files."""

  class_names: tuple[str, ...] = ()

  def __init__(self, place: str):
    paths = sorted(glob.glob(place))
    if not paths:
      raise UserError(f"data source arrayrecord:{place}: no such file")
    try:
      self._records = grain.sources.ArrayRecordDataSource(paths)
      self._place, self._length = place, len(self._records)
    except Exception as error:  # the reader raises its own kinds
      raise UserError(
        f"data source arrayrecord:{place}: not ArrayRecord ({error})"
      ) from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return unpack_image(self._records[index])
    except (struct.error, UnicodeDecodeError) as error:
      raise UserError(
        f"data source arrayrecord:{self._place}: record {index} is no image: expected"
        " int32 label, uint16 length of the key, key, image file"
      ) from error


def pack_image(sample: ImageRecord) -> bytes:
  """Label int32, length of the key uint16, key (UTF-8), image file; little-endian."""
  key = sample.key.encode()
  return HEADER.pack(sample.label, len(key)) + key + sample.image


def unpack_image(record: bytes) -> ImageRecord:
  label, length = HEADER.unpack_from(record)
  end = HEADER.size + length
  return ImageRecord(record[HEADER.size : end].decode(), record[end:], label)


class TfdsSource:
  """A data set that TFDS has prepared as ArrayRecord; read without TensorFlow.

  `NAME[/CONFIG][/SPLIT]`, split train if none is given; its features are `image` and,
  where there are classes, `label`. TFDS_DATA_DIR says where data sets lie.
  """

  def __init__(self, place: str):
    import tensorflow_datasets as tfds

    data_dir = os.environ.get("TFDS_DATA_DIR")
    name, _, split = place.rpartition("/")
    try:
      try:
        builder = tfds.builder(place, data_dir=data_dir)
        split = "train"
      except Exception:
        if not name:
          raise
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:
      raise UserError(
        f"data source tfds:{place}: not found ({_first_line(error)}); prepare it with"
        " `tfds build NAME --file_format=array_record` and set TFDS_DATA_DIR"
      ) from error
    splits = builder.info.splits
    if split.partition("[")[0] not in splits:
      found = ", ".join(splits) or "none, it is not prepared"
      raise UserError(f"data source tfds:{place}: no split {split!r}; it has {found}")
    if "image" not in builder.info.features:
      features = ", ".join(builder.info.features)
      raise UserError(f"data source tfds:{place}: no feature image; it has {features}")
    try:
      self._records = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
    except Exception as error:
      raise UserError(
        f"data source tfds:{place}: cannot be read at random ({_first_line(error)});"
        " prepare it with --file_format=array_record"
      ) from error
    self.class_names = ()
    if "label" in builder.info.features:
      names = getattr(builder.info.features["label"], "names", None)
      self.class_names = tuple(names or ())
    self._split = split

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    record = self._records[index]
    name = record.get("file_name", f"{self._split}/{index}")
    key = name.decode() if isinstance(name, bytes) else str(name)
    return ImageRecord(key, bytes(record["image"]), int(record.get("label", NO_LABEL)))


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class CaptionImageSource:
  """The images of the same folder, in the same order; a `Source`."""

  class_names: tuple[str, ...] = ()

  def __init__(self, folder: str | pathlib.Path):
    self._captions = CaptionSource(folder)
    self._records = grain.sources.ArrayRecordDataSource(
      shards.paths(self._captions.folder, self._captions.manifest, "images")
    )

  def __len__(self) -> int:
    return len(self._captions)

  def __getitem__(self, index: int) -> ImageRecord:
    return ImageRecord(self._captions[index].key, self._records[index])
