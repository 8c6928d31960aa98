"""Code shards: images as the tokenizer's codes, packed for training.

A folder holds ArrayRecord files and one `manifest.json`. A record is one
image: label int32, key length uint16, key (UTF-8), codes uint16
[crops, grid * grid], all little-endian. The manifest is written last, so a
folder without one is not finished.
"""

from collections.abc import Iterable
import dataclasses
import hashlib
import json
import pathlib
import struct
from typing import Any

from array_record.python import array_record_module
import grain
import numpy as np

from llamagen_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
HEADER = struct.Struct("<iH")
# Codes are close to incompressible, and training reads records at random.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class CodeShardSpec:
  """What every record of a folder has in common, fixed before the first one."""

  tokenizer: str  # content hash of the tokenizer's bundle
  tokenizer_config: dict[str, Any]
  image_size: int
  grid: int
  codebook_size: int
  crops: tuple[str, ...]  # names, in the order of a record's rows
  class_names: tuple[str, ...]
  source: str
  samples: int  # of the source; skipped ones included
  shards: int
  background: str = "white"  # as the images were decoded
  ignore_exif: bool = False

  def shard_name(self, index: int) -> str:
    return f"codes-{index:05d}-of-{self.shards:05d}.array_record"

  def shard_range(self, index: int) -> range:
    """The samples of the source that a shard holds, in their order."""
    start, stop = (self.samples * i // self.shards for i in (index, index + 1))
    return range(start, stop)


@dataclasses.dataclass(frozen=True)
class CodeRecord:
  """One image's codes, integers [crops, tokens]."""

  key: str
  label: int
  codes: np.ndarray

  def pack(self) -> bytes:
    key = self.key.encode()
    codes = self.codes.astype("<u2").tobytes()
    return HEADER.pack(self.label, len(key)) + key + codes

  @classmethod
  def unpack(cls, record: bytes, crops: int) -> "CodeRecord":
    label, length = HEADER.unpack_from(record)
    start = HEADER.size + length
    codes = np.frombuffer(record, "<u2", offset=start).reshape(crops, -1)
    return cls(record[HEADER.size : start].decode(), label, codes)


class CodeWriter:
  """Writes a folder of shards; finished shards survive a kill, others are redone.

  A shard is written under a temporary name and renamed; then a small JSON file
  of the same name vouches for it until the manifest does. Several hosts may write
  shards of their own once the plan is there.
  """

  def __init__(self, folder: str | pathlib.Path, plan: CodeShardSpec):
    self.folder, self.plan = pathlib.Path(folder), plan
    self.folder.mkdir(parents=True, exist_ok=True)
    wanted = _as_json(dataclasses.asdict(plan))
    path = self.folder / PLAN
    if path.exists():
      found = json.loads(path.read_text())
      different = [k for k in wanted if wanted[k] != found.get(k)]
      if different:
        k = different[0]
        raise UserError(
          f"{self.folder} was begun with other settings: {k} is {found.get(k)!r}"
          f" there, {wanted[k]!r} here; choose another folder"
        )
    else:
      _write_json(path, wanted)

  def finished(self) -> dict[str, Any] | None:
    """The manifest of a folder that is complete."""
    if not (self.folder / MANIFEST).exists():
      return None
    self._tidy()  # a kill may have come in between
    return read_manifest(self.folder)

  def is_done(self, index: int) -> bool:
    info = self._shard_info(index)
    path = self.folder / self.plan.shard_name(index)
    return info is not None and path.exists() and path.stat().st_size == info["bytes"]

  def write_shard(
    self, index: int, records: Iterable[CodeRecord], skipped: Iterable[str]
  ) -> None:
    """Writes one shard. `skipped` is read after the records are exhausted."""
    name = self.plan.shard_name(index)
    part = self.folder / f".{name}.part"
    code_counts = np.zeros(self.plan.codebook_size, np.int64)
    label_counts: dict[int, int] = {}
    count = 0
    writer = array_record_module.ArrayRecordWriter(str(part), WRITER_OPTIONS)
    for record in records:
      writer.write(record.pack())
      code_counts += np.bincount(record.codes.ravel(), minlength=len(code_counts))
      label_counts[record.label] = label_counts.get(record.label, 0) + 1
      count += 1
    writer.close()
    info = {
      "file": name,
      "records": count,
      "bytes": part.stat().st_size,
      "sha256": _sha256(part),
      "label_counts": {str(k): label_counts[k] for k in sorted(label_counts)},
      "skipped": list(skipped),
      "code_counts": code_counts.tolist(),
    }
    part.rename(self.folder / name)
    _write_json(self._info_path(index), info)

  def finish(self) -> dict[str, Any]:
    """Writes the manifest once all shards are there, and returns it."""
    shards = [self._shard_info(i) for i in range(self.plan.shards)]
    code_counts = np.sum([s.pop("code_counts") for s in shards], axis=0)
    labels: dict[str, int] = {}
    for shard in shards:
      for label, count in shard.pop("label_counts").items():
        labels[label] = labels.get(label, 0) + count
    manifest = {
      "format": FORMAT_VERSION,
      **_as_json(dataclasses.asdict(self.plan)),
      "records": sum(s["records"] for s in shards),
      "label_counts": {k: labels[k] for k in sorted(labels, key=int)},
      "codes_used": int(np.count_nonzero(code_counts)),
      "perplexity": float(perplexity(code_counts)),
      "shards": shards,
    }
    _write_json(self.folder / MANIFEST, manifest)
    self._tidy()
    return manifest

  def _tidy(self) -> None:
    for index in range(self.plan.shards):
      self._info_path(index).unlink(missing_ok=True)

  def _info_path(self, index: int) -> pathlib.Path:
    return (self.folder / self.plan.shard_name(index)).with_suffix(".json")

  def _shard_info(self, index: int) -> dict[str, Any] | None:
    path = self._info_path(index)
    return json.loads(path.read_text()) if path.exists() else None


class CodeSource:
  """Random access to a finished folder of shards; checked when it is opened."""

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder)
    self.manifest = read_manifest(self.folder)
    self.crops = len(self.manifest["crops"])
    paths = [str(self.folder / s["file"]) for s in self.manifest["shards"]]
    self._records = grain.sources.ArrayRecordDataSource(paths)
    if len(self._records) != self.manifest["records"]:
      raise UserError(
        f"code shards {self.folder}: {len(self._records)} records found,"
        f" {self.manifest['records']} expected by the manifest"
      )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> CodeRecord:
    return CodeRecord.unpack(self._records[index], self.crops)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest and checks that every shard is there and whole."""
  path = folder / MANIFEST
  if not path.exists():
    state = "extraction is not finished" if (folder / PLAN).exists() else "not found"
    raise UserError(f"code shards {folder}: no {MANIFEST} ({state})")
  manifest = json.loads(path.read_text())
  if manifest.get("format") != FORMAT_VERSION:
    raise UserError(
      f"{path}: format {manifest.get('format')!r}, expected {FORMAT_VERSION}"
    )
  for shard in manifest["shards"]:
    file = folder / shard["file"]
    size = file.stat().st_size if file.exists() else None
    if size != shard["bytes"]:
      found = "missing" if size is None else f"{size} bytes"
      raise UserError(f"code shard {file}: {found}, expected {shard['bytes']} bytes")
  return manifest


def verify(folder: pathlib.Path) -> None:
  """Reads every shard and compares its checksum with the manifest."""
  for shard in read_manifest(folder)["shards"]:
    found = _sha256(folder / shard["file"])
    if found != shard["sha256"]:
      raise UserError(
        f"code shard {folder / shard['file']}: sha256 {found[:12]}.., expected"
        f" {shard['sha256'][:12]}.."
      )


def perplexity(code_counts: np.ndarray) -> float:
  """exp of the entropy of the codes' frequencies; K when all are used alike."""
  share = code_counts[code_counts > 0] / max(1, code_counts.sum())
  return float(np.exp(-np.sum(share * np.log(share))))


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _as_json(value: Any) -> Any:
  """The value as it will be read back: tuples become lists."""
  return json.loads(json.dumps(value))


def _write_json(path: pathlib.Path, value: Any) -> None:
  part = path.with_name(f".{path.name}.part")
  part.write_text(json.dumps(value, indent=1))
  part.rename(path)
