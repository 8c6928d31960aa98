"""Codes that others have extracted: lines of JSON, and the original's npy folders.

Both are read in the order of their samples, without any image. A sample that cannot be
used is a `BadCodes` with the reason; only a source that cannot be opened ends a run.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any, Protocol

from etils import epath
import numpy as np

from llamagen_jax.data.codes import CodeRecord
from llamagen_jax.data.file_names import is_junk, natural_order
from llamagen_jax.data.sources import (
  MAX_LABEL,
  MAX_LINE_BYTES,
  json_object,
  line_offsets,
  open_lines,
)
from llamagen_jax.errors import UserError, first_line
from llamagen_jax.storage import failing_if_down, sizes, user_path

CODES, LABELS = "_codes", "_labels"  # ends of the original's folder names
FIRST = 100  # samples of which one must be readable to tell the layout of all


class BadCodes(ValueError):
  """Why a sample has no usable codes, in one line that names it."""


class ForeignCodes(Protocol):
  """Codes of a published layout; `read` yields a record or a problem a sample."""

  def __len__(self) -> int: ...

  def read(self, samples: range) -> Iterator[CodeRecord | BadCodes]: ...


def open_codes(spec: str) -> ForeignCodes:
  """Opens jsonl:FILE or npy:FOLDER.

  Raises:
    UserError: for another kind, or files that are not there.
  """
  kinds = {"jsonl": JsonlCodes, "npy": NpyCodes}
  kind, _, path = spec.partition(":")
  if kind not in kinds or not path:
    raise UserError(f"--source={spec}: expected jsonl:FILE or npy:FOLDER")
  return kinds[kind](path)


class JsonlCodes:
  """Lines {"class_id": .., "tokens": [..]}, as RAR publishes maskgitvq.jsonl.

  A line is one crop, or several where `tokens` is a list of lists. Only the offsets of
  the lines are kept in memory, 8 bytes each.
  """

  def __init__(self, path: str):
    self._path = user_path(path)
    if not self._path.is_file():
      raise UserError(f"--source=jsonl:{path}: no such file")
    self._offsets = line_offsets(self._path)
    if not len(self):
      raise UserError(f"--source=jsonl:{path}: no lines in it")

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def read(self, samples: range) -> Iterator[CodeRecord | BadCodes]:
    """Yields the records of consecutive lines; the file is read once, in order."""
    with open_lines(self._path) as file:
      for number in samples:
        start, stop = (int(x) for x in self._offsets[number : number + 2])
        file.seek(start)
        line = file.read(min(stop - start, MAX_LINE_BYTES))
        try:
          yield _record(str(number), *_fields(line))
        except ValueError as error:
          where = f"{self._path.name}, line at byte {start}"
          yield BadCodes(f"{where}: {first_line(error)}, found {line[:60]!r}")


def _fields(line: bytes) -> tuple[Any, Any]:
  fields = json_object(line)
  missing = [name for name in ("class_id", "tokens") if name not in fields]
  if missing:
    raise ValueError(f"no field {missing[0]}")
  return fields["class_id"], fields["tokens"]


class NpyCodes:
  """The original's folders: NAME_codes/0.npy .. of [1, crops, tokens], and NAME_labels.

  Every file of codes has one of the same name, [1], in the folder of labels.
  """

  def __init__(self, path: str):
    self._codes = user_path(path)
    if not self._codes.is_dir() or not self._codes.name.endswith(CODES):
      raise UserError(f"--source=npy:{path}: expected a folder named ..{CODES}")
    name = self._codes.name.removesuffix(CODES) + LABELS
    self._labels = self._codes.parent / name
    if not self._labels.is_dir():
      raise UserError(f"--source=npy:{path}: no folder {self._labels} beside it")
    found = (n for n in sizes(self._codes) if n.endswith(".npy") and not is_junk(n))
    self._files = natural_order(found)
    if not self._files:
      raise UserError(f"--source=npy:{path}: no .npy files in it")

  def __len__(self) -> int:
    return len(self._files)

  def read(self, samples: range) -> Iterator[CodeRecord | BadCodes]:
    """Yields the records of files, in natural order of their names."""
    for number in samples:
      name = self._files[number]
      try:
        label = _array(self._labels / name)
        if label.size != 1:
          raise ValueError(f"label is {label.shape}, expected [1]")
        codes = _array(self._codes / name)
        if codes.ndim == 3 and len(codes) == 1:
          codes = codes[0]
        yield _record(name.removesuffix(".npy"), label.item(), codes)
      except (ValueError, OSError, EOFError) as error:
        yield BadCodes(f"{self._codes.name}/{name}: {first_line(error)}")


def _array(path: epath.Path) -> np.ndarray:
  with failing_if_down(path), path.open("rb") as file:
    return np.load(file, allow_pickle=False)


def _record(key: str, label: Any, codes: Any) -> CodeRecord:
  """Returns the record of a label and of codes [tokens] or [crops, tokens]."""
  if type(label) is not int or not 0 <= label <= MAX_LABEL:
    raise ValueError(f"class {label!r:.40}: expected 0 .. {MAX_LABEL}")
  codes = np.asarray(codes)
  if codes.ndim not in (1, 2) or not codes.size or codes.dtype.kind not in "iu":
    raise ValueError(f"codes are {codes.dtype} {codes.shape}: expected integers")
  return CodeRecord(key, label, np.atleast_2d(codes))


@dataclasses.dataclass(frozen=True)
class CodeLayout:
  """What all samples of a source must have."""

  crops: int
  tokens: int
  codebook_size: int
  classes: int  # 0 = any label

  @staticmethod
  def of(source: ForeignCodes, codebook_size: int, classes: int) -> "CodeLayout":
    """Returns the layout of the first readable sample.

    Raises:
      UserError: for none among the first hundred, or codes of no square grid.
    """
    problem: Any = None
    for found in source.read(range(min(FIRST, len(source)))):
      if isinstance(found, CodeRecord):
        crops, tokens = found.codes.shape
        if round(tokens**0.5) ** 2 != tokens:
          raise UserError(f"--source: {tokens} codes an image are no square grid")
        return CodeLayout(crops, tokens, codebook_size, classes)
      problem = problem or found
    raise UserError(f"--source: no codes can be read: {problem}")

  def problem(self, record: CodeRecord) -> str:
    """Returns why a record does not fit, in one line that names it; "" if it does."""
    found = ""
    if record.codes.shape != (self.crops, self.tokens):
      found = f"codes are {record.codes.shape}, expected {(self.crops, self.tokens)}"
    elif not 0 <= record.codes.min() <= record.codes.max() < self.codebook_size:
      worst = record.codes[(record.codes < 0) | (record.codes >= self.codebook_size)]
      found = f"code {worst[0]} is out of range: the tokenizer has {self.codebook_size}"
    elif self.classes and record.label >= self.classes:
      found = f"class {record.label}: expected 0 .. {self.classes - 1}"
    return found and f"sample {record.key}: {found}"
