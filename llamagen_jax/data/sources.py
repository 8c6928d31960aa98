"""Sources of images: folders, lists of files, ArrayRecord, caption shards, TFDS.

A source is a random-access sequence of records, read by Grain's workers. A record that
cannot be read has a `problem`; only a source that cannot be opened ends a run.
"""

import array
import dataclasses
import io
import json
import os
import pathlib
import stat
import struct
from typing import Any, Protocol

from absl import logging
from etils import epath
import grain
import numpy as np

from llamagen_jax.data import shards
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.file_names import (
  IMAGE_SUFFIXES,
  escape,
  expand_files,
  is_junk,
  list_images,
  natural_order,
)
from llamagen_jax.errors import UserError, first_line
from llamagen_jax.storage import fail_if_down, in_bucket, retry, user_path

NO_LABEL = -1
MAX_LABEL = 2**31 - 1  # records store labels in 32 bits
MAX_FILE_BYTES = 2**28  # of an image's file
MAX_LINE_BYTES = 2**24  # of a line of a list
PATH_KEYS = ("image_path", "file_name", "path", "image", "filename", "filepath")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclasses.dataclass(frozen=True)
class ImageRecord:
  """An image file as its source holds it, or the reason why there is none."""

  key: str  # names the record in logs and in code shards
  image: bytes
  label: int = NO_LABEL
  problem: str = ""  # why the image cannot be read

  def __post_init__(self):
    object.__setattr__(self, "key", escape(self.key))


class Source(Protocol):
  """Random access to records; `class_names` is empty for unlabelled images."""

  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> ImageRecord: ...


def open_source(spec: str) -> Source:
  """Opens `kind:path`: folder:, jsonl:, arrayrecord:, captions: or tfds:NAME/SPLIT."""
  kinds = {
    "folder": FolderSource,
    "jsonl": JsonlSource,
    "arrayrecord": ArrayRecordSource,
    "captions": CaptionImageSource,
    "tfds": TfdsSource,
  }
  kind, _, path = spec.partition(":")
  if kind not in kinds or not path:
    raise UserError(
      f"data source {spec!r}: expected folder:PATH, jsonl:FILE, arrayrecord:FILES,"
      " captions:PATH or tfds:NAME[/SPLIT]"
    )
  return kinds[kind](path)


class FolderSource:
  """A folder of folders of images; a class is a folder, in natural order.

  The images of a class may lie in folders of its own. Images that lie beside the
  classes have no label; without classes all images are unlabelled.
  """

  def __init__(self, path: str):
    self._root = user_path(path)
    name = f"data source folder:{path}"
    if not self._root.is_dir():
      raise UserError(f"{name}: no such folder")
    files = list_images(self._root)
    if not files:
      suffixes = ", ".join(IMAGE_SUFFIXES)
      raise UserError(f"{name}: no images ({suffixes}) in it or in its folders")
    folders = natural_order(
      entry.name
      for entry in self._root.iterdir()
      if not is_junk(entry.name) and entry.is_dir()
    )
    unlabelled = [file for file in files if "/" not in file]
    if len(unlabelled) == len(files):
      folders = []
    labels = {folder: label for label, folder in enumerate(folders)}
    self.class_names = tuple(map(escape, folders))
    self._files = [(f, labels.get(f.partition("/")[0], NO_LABEL)) for f in files]
    self._files.sort(key=lambda file: file[1])  # stable: class by class
    self._check_layout(name, folders, len(unlabelled))

  def _check_layout(self, name: str, folders: list[str], unlabelled: int) -> None:
    """Refuses folders of splits taken for classes; names what has no class or image."""
    depths = {(f.partition("/")[0], f.count("/")) for f, _ in self._files}
    splits = [f for f in folders if f.lower() in SPLITS]
    if splits and splits == folders and all(depth > 1 for _, depth in depths):
      raise UserError(
        f"{name}: holds {', '.join(splits)}; give one of them, such as"
        f" folder:{self._root / splits[0]}"
      )
    if folders and unlabelled:
      logging.warning(
        "%s: %d images beside its folders have no class", name, unlabelled
      )
    if empty := sorted(set(folders) - {folder for folder, _ in depths}):
      shown = escape(", ".join(empty[:8]))
      logging.warning("%s: %d classes without images: %s", name, len(empty), shown)

  @property
  def labels(self) -> list[int]:
    """Returns the class of each image, without reading it."""
    return [label for _, label in self._files]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> ImageRecord:
    file, label = self._files[index]
    image, problem = read_image(self._root / file)
    return ImageRecord(file, image, label, problem)


def read_image(path: epath.Path) -> tuple[bytes, str]:
  """Reads an image's file; returns (bytes, "") or (b"", why it cannot be read)."""
  try:
    if not in_bucket(path):
      status = os.stat(path)
      if not stat.S_ISREG(status.st_mode):  # a device might never end
        return b"", "not a file"
      if status.st_size > MAX_FILE_BYTES:
        return b"", f"{status.st_size} bytes, expected at most {MAX_FILE_BYTES}"
    image = retry(path.read_bytes) if in_bucket(path) else path.read_bytes()
  except FileNotFoundError:
    return b"", "no such file"
  except ValueError:  # whose words differ between versions of Python
    return b"", "a null byte in its path"
  except OSError as error:
    fail_if_down(path, error)
    return b"", error.strerror or str(error)
  return image, "" if image else "an empty file"


def image_path(root: epath.Path, name: Any) -> epath.Path:
  """Returns the path that a list gives an image; raises ValueError for another type."""
  if not isinstance(name, str) or not name:
    raise ValueError(f"the image's path is {name!r:.80}, expected text")
  try:
    return user_path(name) if "://" in name else root / name
  except UserError as error:
    raise ValueError(str(error)) from error


HEADER = struct.Struct("<iH")  # label, length of the key


class JsonlSource:
  """Lines of JSON with an image's path, and `label` (an integer) where there are any.

  The path is the field image_path, file_name or path, relative to the file. Only the
  offsets of the lines are kept in memory, 8 bytes each: 0.4 GB for fifty million.
  """

  class_names: tuple[str, ...] = ()

  def __init__(self, path: str):
    self._path = user_path(path)
    if not self._path.is_file():
      raise UserError(f"data source jsonl:{path}: no such file")
    self._offsets = line_offsets(self._path)
    if len(self) == 0:
      raise UserError(f"data source jsonl:{path}: no lines in it")

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    start, stop = (int(x) for x in self._offsets[index : index + 2])
    with self._path.open("rb") as file:
      file.seek(start)
      line = file.read(min(stop - start, MAX_LINE_BYTES))
    try:
      fields = json_object(line)
      name = next((fields[key] for key in PATH_KEYS if key in fields), None)
      path = image_path(self._path.parent, name)
      label = fields.get("label", NO_LABEL)
      if type(label) is not int or not NO_LABEL <= label <= MAX_LABEL:
        raise ValueError(f"label is {label!r:.80}, expected 0 .. {MAX_LABEL}")
    except ValueError as error:
      key = f"{self._path.name}, line at byte {start}"
      return ImageRecord(key, b"", problem=f"{error}, found {line[:80]!r}")
    image, problem = read_image(path)
    return ImageRecord(name, image, label, problem)


def json_object(text: bytes) -> dict[str, Any]:
  """Parses an object of JSON; raises ValueError for anything else."""
  try:
    fields = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
  except RecursionError as error:
    raise ValueError("JSON too deep") from error
  if not isinstance(fields, dict):
    raise ValueError(f"JSON is {json.dumps(fields)[:40]}, expected an object")
  return fields


def open_lines(path: epath.Path) -> io.BufferedReader:
  """Opens a file whose `readline` takes a limit, as a bucket's (fsspec) does not."""
  return io.BufferedReader(path.open("rb"))


def line_offsets(path: epath.Path) -> np.ndarray:
  """Returns int64 [lines + 1]: where lines that are not blank start, and the end."""
  offsets, position, starts = array.array("q"), 0, True
  with open_lines(path) as file:
    while part := file.readline(MAX_LINE_BYTES):
      if starts and part.strip():
        offsets.append(position)
      position += len(part)
      starts = part.endswith(b"\n")
  offsets.append(position)
  return np.frombuffer(offsets, np.int64)


class ArrayRecordSource:
  """ArrayRecord files of `pack_image`'s records; `*` stands for several files."""

  class_names: tuple[str, ...] = ()

  def __init__(self, pattern: str):
    self._name = f"data source arrayrecord:{pattern}"
    paths = expand_files(self._name, pattern)
    try:
      self._records = grain.sources.ArrayRecordDataSource(list(paths))
      self._length = len(self._records)
    except Exception as error:  # the reader raises its own kinds
      raise UserError(f"{self._name}: not ArrayRecord ({first_line(error)})") from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return unpack_image(self._records[index])
    except Exception as error:  # of the reader or of the record; both are one image's
      fail_if_down(self._name, error)
      problem = (
        f"no int32 label, uint16 length of the key, key, image ({first_line(error)})"
      )
      return ImageRecord(f"{self._name}, record {index}", b"", problem=problem)


def pack_image(record: ImageRecord) -> bytes:
  """Label int32, length of the key uint16, key (UTF-8), image file; little-endian."""
  key = record.key.encode()
  return HEADER.pack(record.label, len(key)) + key + record.image


def unpack_image(packed: bytes) -> ImageRecord:
  """Reads `pack_image`'s bytes; raises struct.error or ValueError for others."""
  label, length = HEADER.unpack_from(packed)
  end = HEADER.size + length
  if label < NO_LABEL or end > len(packed):
    raise ValueError(f"label {label}, key of {length} bytes")
  return ImageRecord(packed[HEADER.size : end].decode(), packed[end:], label)


class TfdsSource:
  """A data set that TFDS has prepared as ArrayRecord; read without TensorFlow.

  `NAME[/CONFIG][/SPLIT]`, split train if none is given; its features are `image` and,
  where there are classes, `label`. TFDS_DATA_DIR says where data sets lie.
  """

  def __init__(self, spec: str):
    import tensorflow_datasets as tfds

    builder, self._split = _tfds_builder(spec)
    splits: Any = builder.info.splits
    features: Any = builder.info.features
    if self._split.partition("[")[0] not in splits:
      known = ", ".join(splits) or "none, it is not prepared"
      raise UserError(
        f"data source tfds:{spec}: no split {self._split!r}; it has {known}"
      )
    if "image" not in features:
      known = ", ".join(features)
      raise UserError(f"data source tfds:{spec}: no feature image; it has {known}")
    try:
      self._records = builder.as_data_source(
        split=self._split,  # pyright: ignore[reportCallIssue]
        decoders={"image": tfds.decode.SkipDecoding()},
      )
    except Exception as error:
      raise UserError(
        f"data source tfds:{spec}: cannot be read at random ({first_line(error)});"
        " prepare it with --file_format=array_record"
      ) from error
    names = getattr(features["label"], "names", None) if "label" in features else None
    self.class_names = tuple(names or ())

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> ImageRecord:
    if not 0 <= index < len(self):
      raise IndexError(index)
    key = f"{self._split}/{index}"
    try:
      record = self._records[index]
      name = record.get("file_name", key)
      key = os.fsdecode(name) if isinstance(name, bytes) else str(name)
      image, label = bytes(record["image"]), int(record.get("label", NO_LABEL))
    except Exception as error:  # of the reader or of the record; both are one image's
      fail_if_down(key, error)
      return ImageRecord(key, b"", problem=first_line(error))
    return ImageRecord(key, image, label)


def _tfds_builder(spec: str):
  """Returns the builder of NAME[/CONFIG][/SPLIT] and its split."""
  import tensorflow_datasets as tfds

  data_dir = os.environ.get("TFDS_DATA_DIR")
  name, _, split = spec.rpartition("/")
  try:
    try:
      return tfds.builder(spec, data_dir=data_dir), "train"
    except Exception:
      if not name:
        raise
      return tfds.builder(name, data_dir=data_dir), split
  except Exception as error:
    raise UserError(
      f"data source tfds:{spec}: not found ({first_line(error)}); prepare it with"
      " `tfds build NAME --file_format=array_record` (it needs: pip install"
      " tensorflow) and set TFDS_DATA_DIR"
    ) from error


class CaptionImageSource:
  """The images of caption shards, in the captions' order; a `Source`."""

  class_names: tuple[str, ...] = ()

  def __init__(self, folder: str | pathlib.Path):
    captions = self._captions = CaptionSource(folder)
    self._records = shards.Records(captions.folder, captions.manifest, "images", bytes)

  def __len__(self) -> int:
    return len(self._captions)

  def __getitem__(self, index: int) -> ImageRecord:
    key = f"record {index}"
    try:
      key = self._captions[index].key
      return ImageRecord(key, self._records[index])
    except UserError as error:  # a damaged record is one bad image
      return ImageRecord(key, b"", problem=str(error))
