"""Files that images with captions come in, read piece by piece.

A piece is what one process reads from front to back: a tar, a parquet file, or a
stretch of a list. What cannot be read is a sample with a `problem`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import glob
import itertools
import json
import os
import pathlib
import tarfile
from typing import Any, Protocol

from llamagen_jax.data.sources import SUFFIXES
from llamagen_jax.errors import UserError

# Where a caption is looked for if no key is given; the names that are in use.
CAPTION_KEYS = ("caption", "text", "TEXT", "top_caption", "prompt")
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "image", "picture")
KINDS = "webdataset:, parquet:, jsonl:, coco: or folder:"


@dataclasses.dataclass(frozen=True)
class FieldNames:
  """Names of fields; empty = the usual ones."""

  caption_key: str = ""
  short_key: str = ""
  image_key: str = ""


@dataclasses.dataclass(frozen=True)
class RawSample:
  """What stands in a file, not looked at yet; `problem` is "reason: detail"."""

  key: str
  source: str
  image: bytes = b""
  caption: str = ""
  short: str = ""
  problem: str = ""


class CaptionFiles(Protocol):
  """A picklable reader of a source with a fixed number of pieces."""

  pieces: int

  def read(self, piece: int) -> Iterator[RawSample]: ...


def open_files(spec: str, keys: FieldNames, images: str, pieces: int) -> CaptionFiles:
  """Opens `kind:place`; `pieces` is for the kinds that have none of their own."""
  kind, _, place = spec.partition(":")
  if kind == "webdataset":
    return Tars(_expand(spec, place), keys)
  if kind == "parquet":
    return Parquets(_expand(spec, place), keys)
  if kind == "jsonl":
    return JsonLines.open(_expand(spec, place), keys, images, pieces)
  if kind == "coco":
    return Coco.open(_expand(spec, place), images, pieces)
  if kind == "folder":
    return PairedFiles.open(place, pieces)
  raise UserError(f"--source={spec}: expected {KINDS}PATH")


@dataclasses.dataclass(frozen=True)
class Tars:
  """img2dataset's webdataset: KEY.jpg, KEY.txt and KEY.json next to each other."""

  files: tuple[str, ...]
  keys: FieldNames

  @property
  def pieces(self) -> int:
    return len(self.files)

  def read(self, piece: int) -> Iterator[RawSample]:
    path = self.files[piece]
    name = os.path.basename(path)
    try:
      with tarfile.open(path) as tar:
        members = ((*_split(m.name), m) for m in tar if m.isfile())
        for key, group in itertools.groupby(members, lambda member: member[0]):
          parts = {suffix: tar.extractfile(m).read() for _, suffix, m in group}
          yield self._sample(key, name, parts)
      if not _ends(path):  # tarfile takes a cut between two files for the end
        yield RawSample(name, name, problem="broken files: cut off")
    except (tarfile.TarError, OSError, EOFError) as error:
      yield RawSample(name, name, problem=f"broken files: {error}")

  def _sample(self, key: str, name: str, parts: dict[str, bytes]) -> RawSample:
    image = next((parts[s] for s in SUFFIXES if s in parts), None)
    if image is None:
      return RawSample(key, name, problem="missing images")
    try:
      fields = json.loads(parts.get(".json", b"{}"))
      text = parts[".txt"].decode() if ".txt" in parts else None
    except ValueError as error:
      return RawSample(key, name, problem=f"broken texts: {error}")
    if text is None or self.keys.caption_key:
      text = _caption(fields, self.keys.caption_key)
    return RawSample(key, name, image, text, _text(fields, self.keys.short_key))


@dataclasses.dataclass(frozen=True)
class Parquets:
  """Rows with the bytes of an image, as they are or as `datasets` stores them."""

  files: tuple[str, ...]
  keys: FieldNames

  @property
  def pieces(self) -> int:
    return len(self.files)

  def read(self, piece: int) -> Iterator[RawSample]:
    try:
      from pyarrow import ArrowException, parquet
    except ImportError as error:
      raise UserError("parquet needs pyarrow: pip install -e '.[text]'") from error
    path, row_number = self.files[piece], itertools.count()
    name = os.path.basename(path)
    try:
      file = parquet.ParquetFile(path)
      column = self._image_column(path, file.schema_arrow.names)
      for batch in file.iter_batches(batch_size=64):
        for row in batch.to_pylist():
          yield self._sample(row, column, f"{name}:{next(row_number)}", name)
    except (ArrowException, OSError) as error:
      yield RawSample(name, name, problem=f"broken files: {error}")

  def _image_column(self, path: str, columns: list[str]) -> str:
    wanted = (self.keys.image_key,) if self.keys.image_key else IMAGE_KEYS
    found = [name for name in wanted if name in columns]
    if not found:
      raise UserError(
        f"{path}: no column {' or '.join(wanted)} of images; its columns are"
        f" {', '.join(columns)}; give --image-key"
      )
    return found[0]

  def _sample(self, row: dict, column: str, place: str, name: str) -> RawSample:
    key, image = str(row.get("key") or place), row[column]
    if isinstance(image, dict):
      image = image.get("bytes")
    if not isinstance(image, bytes) or not image:
      return RawSample(key, name, problem="missing images")
    caption = _caption(row, self.keys.caption_key)
    return RawSample(key, name, image, caption, _text(row, self.keys.short_key))


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """The original's lists: {"image_path": .., "text": {"name": ..}} a line."""

  stretches: tuple[tuple[str, int, int, int], ...]  # file, first byte, line, lines
  keys: FieldNames
  images: str

  @classmethod
  def open(cls, files, keys: FieldNames, images: str, pieces: int) -> "JsonLines":
    lines = []
    for path in files:
      with open(path, "rb") as file:
        lines.append(sum(1 for _ in file))
    size = max(1, -(-sum(lines) // pieces))  # lines of a piece; never of two files
    stretches = []
    for path, count in zip(files, lines, strict=True):
      with open(path, "rb") as file:
        for first in range(0, count, size):
          stretches.append((path, file.tell(), first, min(size, count - first)))
          for _ in range(stretches[-1][3]):
            file.readline()
    if not stretches:
      raise UserError(f"{files[0]}: empty")
    return cls(tuple(stretches), keys, images)

  @property
  def pieces(self) -> int:
    return len(self.stretches)

  def read(self, piece: int) -> Iterator[RawSample]:
    path, offset, first, count = self.stretches[piece]
    name = os.path.basename(path)
    root = self.images or os.path.dirname(path)
    with open(path, "rb") as file:
      file.seek(offset)
      for number in range(first, first + count):
        yield self._sample(file.readline(), root, f"{name}:{number + 1}", name)

  def _sample(self, line: bytes, root: str, key: str, name: str) -> RawSample:
    try:
      fields = json.loads(line)
      place = fields["image_path"]
    except (ValueError, KeyError, TypeError) as error:
      return RawSample(key, name, problem=f"broken lines: {error!r}")
    texts = fields.get("text", fields)
    if isinstance(texts, str):
      texts = {"text": texts}
    if not self.keys.caption_key and len(texts) == 1:
      caption = _text(texts, next(iter(texts)))
    else:
      caption = _caption(texts, self.keys.caption_key)
    return _with_image(
      RawSample(key, name, b"", caption, _text(texts, self.keys.short_key)),
      os.path.join(root, place),
    )


@dataclasses.dataclass(frozen=True)
class Coco:
  """COCO's caption annotations; every caption is a sample of its own."""

  name: str
  root: str
  samples: tuple[tuple[str, str, str], ...]  # key, file, caption
  pieces: int

  @classmethod
  def open(cls, files, images: str, pieces: int) -> "Coco":
    if len(files) > 1 or not images:
      raise UserError("coco: one annotation file, and --images=FOLDER of its images")
    try:
      fields = json.loads(pathlib.Path(files[0]).read_text())
      names = {image["id"]: image["file_name"] for image in fields["images"]}
      samples = tuple(
        (f"{a['image_id']}-{a['id']}", names.get(a["image_id"], ""), a["caption"])
        for a in sorted(fields["annotations"], key=lambda a: a["id"])
      )
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{files[0]}: not COCO's captions ({error!r})") from error
    pieces = min(pieces, max(1, len(samples)))
    return cls(os.path.basename(files[0]), images, samples, pieces)

  def read(self, piece: int) -> Iterator[RawSample]:
    for key, file, caption in _stretch(self.samples, piece, self.pieces):
      raw = RawSample(key, self.name, caption=caption)
      yield _with_image(raw, os.path.join(self.root, file))


@dataclasses.dataclass(frozen=True)
class PairedFiles:
  """A folder, with folders in it or not, of NAME.jpg next to NAME.txt."""

  root: str
  files: tuple[str, ...]
  pieces: int

  @classmethod
  def open(cls, root: str, pieces: int) -> "PairedFiles":
    if not os.path.isdir(root):
      raise UserError(f"--source=folder:{root}: no such folder")
    found = sorted(
      os.path.relpath(os.path.join(folder, name), root)
      for folder, _, names in os.walk(root)
      for name in names
      if name.lower().endswith(SUFFIXES)
    )
    if not found:
      raise UserError(f"--source=folder:{root}: no images ({', '.join(SUFFIXES)})")
    return cls(root, tuple(found), min(pieces, len(found)))

  def read(self, piece: int) -> Iterator[RawSample]:
    for file in _stretch(self.files, piece, self.pieces):
      path = pathlib.Path(self.root, file)
      key = os.path.splitext(file)[0]
      try:
        caption = path.with_suffix(".txt").read_text("utf-8").strip()
      except (OSError, ValueError) as error:
        yield RawSample(key, file, problem=f"missing captions: {error}")
        continue
      yield _with_image(RawSample(key, file, caption=caption), str(path))


def _expand(spec: str, place: str) -> tuple[str, ...]:
  found = sorted(glob.glob(place)) if glob.has_magic(place) else [place]
  if not found or not os.path.isfile(found[0]):
    raise UserError(f"--source={spec}: no such file")
  return tuple(found)


def _ends(path: str) -> bool:
  """Whether a tar has the two empty blocks of its end."""
  with open(path, "rb") as file:
    file.seek(max(0, os.path.getsize(path) - 1024))
    return not any(file.read())


def _split(name: str) -> tuple[str, str]:
  """A member's name up to the first dot of its last part, and the rest."""
  folder, slash, base = name.rpartition("/")
  stem, dot, suffix = base.partition(".")
  return folder + slash + stem, (dot + suffix).lower()


def _caption(fields: Mapping[str, Any], key: str) -> str:
  if key:
    return _text(fields, key)
  return next((t for k in CAPTION_KEYS if (t := _text(fields, k))), "")


def _text(fields: Mapping[str, Any], key: str) -> str:
  value = fields.get(key)
  return value if isinstance(value, str) else ""


def _stretch(samples: tuple, piece: int, pieces: int) -> tuple:
  start, stop = (len(samples) * i // pieces for i in (piece, piece + 1))
  return samples[start:stop]


def _with_image(sample: RawSample, path: str) -> RawSample:
  try:
    return dataclasses.replace(sample, image=pathlib.Path(path).read_bytes())
  except OSError as error:
    return dataclasses.replace(sample, problem=f"missing images: {error}")
