"""Lists of images with captions: JSON lines, COCO's annotations, folders of pairs."""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from etils import epath

from llamagen_jax.data.caption_records import (
  CaptionedImage,
  FieldNames,
  Unusable,
  decode_caption,
  image_of,
  listed,
  with_captions,
)
from llamagen_jax.data.file_names import IMAGE_SUFFIXES, list_images
from llamagen_jax.data.sources import (
  MAX_LINE_BYTES,
  PATH_KEYS,
  json_object,
  open_lines,
)
from llamagen_jax.errors import UserError
from llamagen_jax.storage import fail_if_down, read_json, retry, user_path

MAX_TEXT_BYTES = 2**20  # of a caption's file


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """Lists, a JSON object a line: {"image_path": .., "text": .. or {"name": ..}}.

  Hugging Face's metadata.jsonl, with `file_name`, is one, too.
  """

  parts: tuple[tuple[str, int, int, int], ...]  # file, first byte, line, lines
  keys: FieldNames
  images: str

  @classmethod
  def open(cls, files, keys: FieldNames, images: str, shards: int) -> "JsonLines":
    lines = []
    for path in files:
      with open_lines(user_path(path)) as file:
        lines.append(sum(1 for _ in iter(lambda: _read_line(file)[1], 0)))
    size = max(1, -(-sum(lines) // shards))  # lines of a shard; never of two files
    parts = []
    for path, count in zip(files, lines, strict=True):
      with open_lines(user_path(path)) as file:
        for first in range(0, count, size):
          parts.append((path, file.tell(), first, min(size, count - first)))
          for _ in range(parts[-1][3]):
            _read_line(file)
    if not parts:
      raise UserError(f"{files[0]}: empty")
    return cls(tuple(parts), keys, images)

  @property
  def shards(self) -> int:
    return len(self.parts)

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    path, offset, first, count = self.parts[shard]
    name = os.path.basename(path)
    root = user_path(self.images or os.path.dirname(path) or ".")
    with open_lines(user_path(path)) as file:
      file.seek(offset)
      for number in range(first, first + count):
        line, size = _read_line(file)
        record = CaptionedImage(f"{name}:{number + 1}", name)
        if size > len(line):
          problem = f"broken lines: {size} bytes, expected at most {MAX_LINE_BYTES}"
          yield dataclasses.replace(record, problem=problem)
        elif line.strip():
          yield from self._records(line, record, root)

  def _records(
    self, line: bytes, record: CaptionedImage, root: epath.Path
  ) -> Iterator[CaptionedImage]:
    try:
      fields = json_object(line)
      names = (self.keys.image_key,) if self.keys.image_key else PATH_KEYS
      path = next((fields[name] for name in names if name in fields), None)
      if not set(names) & fields.keys():
        raise Unusable(
          f"missing images: no {' or '.join(names)} among {listed(fields)};"
          " --image-key names one"
        )
      texts = fields.get("text")
      keys = self.keys
      if isinstance(texts, dict) and keys.caption_key not in fields:
        fields = texts
        if len(texts) == 1 and not keys.caption_key:
          keys = dataclasses.replace(keys, caption_key=next(iter(texts)))
      record = dataclasses.replace(record, image=image_of(root, path))
      yield from with_captions(record, fields, keys)
    except ValueError as error:
      yield dataclasses.replace(record, problem=f"broken lines: {error}")
    except Unusable as problem:
      yield dataclasses.replace(record, problem=str(problem))


def _read_line(file) -> tuple[bytes, int]:
  """Reads a line; returns its first MAX_LINE_BYTES and its size, 0 at the end."""
  line = part = file.readline(MAX_LINE_BYTES)
  size = len(line)
  while part and not part.endswith(b"\n"):
    part = file.readline(MAX_LINE_BYTES)
    size += len(part)
  return line, size


@dataclasses.dataclass(frozen=True)
class Coco:
  """COCO's caption annotations; every caption is a record of its own."""

  name: str
  root: str
  records: tuple[tuple[str, Any, Any], ...]  # key, file, caption
  shards: int

  @classmethod
  def open(cls, files, images: str, shards: int) -> "Coco":
    if len(files) > 1 or not images:
      raise UserError(
        "coco: one annotation file, and --image-folder=FOLDER of its images"
      )
    fields = read_json(user_path(files[0]))
    lists = [
      fields.get(name) if isinstance(fields, dict) else None
      for name in ("images", "annotations")
    ]
    if not all(isinstance(found, list) for found in lists):
      raise UserError(
        f"{files[0]}: not COCO's captions: expected lists `images` and `annotations`"
      )
    found, annotations = ([x for x in xs if isinstance(x, dict)] for xs in lists)
    names = {str(image.get("id")): image.get("file_name") for image in found}
    annotations.sort(key=lambda a: a["id"] if isinstance(a.get("id"), int) else -1)
    records = tuple(
      (f"{a.get('image_id')}-{a.get('id')}", names.get(str(a.get("image_id"))),
       a.get("caption"))
      for a in annotations
    )  # fmt: skip
    if broken := len(lists[1]) - len(annotations):
      records += (("annotations", None, f"{broken} that are no objects"),)
    shards = min(shards, max(1, len(records)))
    return cls(os.path.basename(files[0]), images, records, shards)

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    root = user_path(self.root)
    for key, file, caption in _share(self.records, shard, self.shards):
      record = CaptionedImage(key, self.name)
      try:
        record = dataclasses.replace(record, image=image_of(root, file))
        yield from with_captions(record, {"caption": caption}, FieldNames())
      except Unusable as problem:
        yield dataclasses.replace(record, problem=str(problem))


@dataclasses.dataclass(frozen=True)
class PairedFiles:
  """A folder, with folders in it or not, of NAME.jpg next to NAME.txt."""

  root: str
  files: tuple[str, ...]
  shards: int

  @classmethod
  def open(cls, path: str, shards: int) -> "PairedFiles":
    root = user_path(path)
    if not root.is_dir():
      raise UserError(f"--source=folder:{path}: no such folder")
    files = list_images(root)
    if not files:
      raise UserError(
        f"--source=folder:{path}: no images ({', '.join(IMAGE_SUFFIXES)})"
      )
    table = root / "metadata.jsonl"
    if table.exists() and not (root / files[0]).with_suffix(".txt").exists():
      raise UserError(
        f"--source=folder:{path}: its captions are in metadata.jsonl; expected"
        f" --source=jsonl:{table}"
      )
    return cls(os.fspath(root), tuple(files), min(shards, len(files)))

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    root = epath.Path(self.root)
    for file in _share(self.files, shard, self.shards):
      record = CaptionedImage(os.path.splitext(file)[0], file)
      path = root / file
      try:
        try:
          text = retry(path.with_suffix(".txt").read_bytes)
        except OSError as error:
          fail_if_down(path, error)
          raise Unusable(f"missing captions: no {path.stem}.txt") from error
        if len(text) > MAX_TEXT_BYTES:
          raise Unusable(f"broken texts: {len(text)} bytes of caption")
        fields = {"caption": decode_caption(text, f"{path.stem}.txt").strip()}
        record = dataclasses.replace(record, image=image_of(root, file))
        yield from with_captions(record, fields, FieldNames())
      except Unusable as problem:
        yield dataclasses.replace(record, problem=str(problem))


def _share(records: tuple, shard: int, shards: int) -> tuple:
  start, stop = (len(records) * i // shards for i in (shard, shard + 1))
  return records[start:stop]
