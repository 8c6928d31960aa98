"""Tars of images with captions: KEY.jpg, KEY.txt and KEY.json next to each other."""

from collections.abc import Iterator
import dataclasses
import itertools
import lzma
import os
import tarfile
import zlib

from llamagen_jax.data.caption_records import (
  CAPTION_KEYS,
  CaptionedImage,
  FieldNames,
  Unusable,
  decode_caption,
  with_captions,
)
from llamagen_jax.data.file_names import IMAGE_SUFFIXES, is_junk
from llamagen_jax.data.sources import MAX_FILE_BYTES, json_object
from llamagen_jax.storage import failing_if_down, user_path

MAX_TEXT_BYTES = 2**20  # of a .txt or .json
BLOCK = 512  # bytes of a header, and of the empty one at the end
# Of tarfile and its decompressors; ValueError and OverflowError: absurd numbers.
TAR_ERRORS = (
  tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError,
  OverflowError, MemoryError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tars:
  """Tars as img2dataset writes them, compressed or not; a shard is a tar."""

  files: tuple[str, ...]
  keys: FieldNames

  @property
  def shards(self) -> int:
    return len(self.files)

  def read(self, shard: int) -> Iterator[CaptionedImage]:
    path = self.files[shard]
    name = os.path.basename(path)
    try:
      with (
        failing_if_down(path),
        user_path(path).open("rb") as file,
        tarfile.open(fileobj=file) as tar,
      ):
        yield from self._read(tar, name)
    except TAR_ERRORS as error:
      detail = str(error).partition("\n")[0]
      yield CaptionedImage(name, name, problem=f"broken files: {detail}")

  def _read(self, tar: tarfile.TarFile, name: str) -> Iterator[CaptionedImage]:
    members = (
      (*_split(member.name), member)
      for member in tar
      if member.isfile() and not is_junk(member.name)
    )
    seen = set()
    for key, group in itertools.groupby(members, lambda member: member[0]):
      parts = {suffix: _read_member(tar, suffix, member) for _, suffix, member in group}
      record = CaptionedImage(key, name)
      if key in seen:
        problem = "unsorted files: image and caption are apart; sort the tar by name"
        yield dataclasses.replace(record, problem=problem)
        continue
      seen.add(key)
      try:
        yield from self._records(record, parts)
      except Unusable as problem:
        yield dataclasses.replace(record, problem=str(problem))
    tar.fileobj.seek(tar.offset)  # where tarfile stopped without a word
    block = tar.fileobj.read(BLOCK)
    if len(block) < BLOCK or any(block):
      state = "cut off" if len(block) < BLOCK else "damaged"
      problem = f"broken files: {state} at byte {tar.offset}"
      yield CaptionedImage(name, name, problem=problem)

  def _records(
    self, record: CaptionedImage, parts: dict[str, bytes | None]
  ) -> Iterator[CaptionedImage]:
    image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), b"")
    if image is None:
      raise Unusable(f"broken images: more than {MAX_FILE_BYTES} bytes")
    if not image:
      raise Unusable(f"missing images: only {', '.join(parts)}")
    record = dataclasses.replace(record, image=image)
    fields, text = {}, None
    if ".txt" in parts and not self.keys.caption_key:
      text = decode_caption(parts[".txt"] or b"", ".txt")
    if ".json" in parts and (text is None or self.keys.short_key):
      try:
        fields = json_object(parts[".json"] or b"")
      except ValueError as error:
        raise Unusable(f"broken texts: .json: {error}") from error
    if text is None and ".json" not in parts:
      raise Unusable(f"missing captions: no .txt or .json, only {', '.join(parts)}")
    if text is not None:
      fields = {**fields, CAPTION_KEYS[0]: text}
    yield from with_captions(record, fields, self.keys)


def _read_member(
  tar: tarfile.TarFile, suffix: str, member: tarfile.TarInfo
) -> bytes | None:
  """Reads an image or text of a tar; None where it is too large, b"" for others."""
  if suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
    return b""
  limit = MAX_FILE_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES
  return tar.extractfile(member).read() if 0 <= member.size <= limit else None


def _split(name: str) -> tuple[str, str]:
  """Splits a member's name at the first dot of its last part."""
  folder, slash, base = name.rpartition("/")
  stem, dot, suffix = base.partition(".")
  return folder + slash + stem, (dot + suffix).lower()
