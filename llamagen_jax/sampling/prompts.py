"""Prompts as conditions of images, and the files that they come in."""

from collections.abc import Iterator, Sequence
import csv
import dataclasses
import functools
import io
import re

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import read_text, text_lines, user_path, write_text
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.text.t5 import padded_features
from llamagen_jax.weights.bundle import Transformer

FILE = re.compile(
  r"(?P<name>.*?\.(?P<suffix>txt|csv|tsv))(:(?P<column>.*))?", re.DOTALL | re.IGNORECASE
)
QUOTED = re.compile(r'"(?:[^"]|"")*+"')  # a field in quotes, its own doubled
MAX_SHOWN = 300  # characters of a list of columns
COLUMNS = ("prompt", "caption", "text")  # looked for, in any case
NAME_LENGTH = 40  # characters next to an image
CAPTIONS = "captions.txt"


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts as conditions, encoded a batch at a time and each of them once.

  With a negative prompt a condition is a pair: guidance leads away from the
  second one instead of from the trained unconditional embedding.
  """

  prompts: tuple[str, ...]  # one an image
  encoder: TextEncoder
  tokens: int  # the model's caption_tokens
  negative: str = ""

  @classmethod
  def of(
    cls,
    gpt: Transformer,
    encoder: TextEncoder,
    prompts: Sequence[str],
    negative: str = "",
  ) -> "Prompts":
    """Makes prompts for a transformer, which must have learned this encoder's features.

    Raises:
      UserError: another encoder, or a prompt that is no text.
    """
    if gpt.text_encoder and encoder.identity != gpt.text_encoder:
      raise UserError(
        f"the text encoder {encoder.identity[:12]} is not the one that the transformer"
        f" was trained with, {gpt.text_encoder[:12]}"
      )
    if encoder.config.dim != gpt.config.caption_dim:
      raise UserError(
        f"the text encoder's features are {encoder.config.dim} wide, the model expects"
        f" {gpt.config.caption_dim}"
      )
    for prompt in (*prompts, negative):
      try:
        prompt.encode()
      except UnicodeEncodeError as error:
        raise UserError(f"prompt {prompt[:NAME_LENGTH]!r}: not UTF-8") from error
    return cls(tuple(prompts), encoder, gpt.config.caption_tokens, negative)

  def __len__(self) -> int:
    return len(self.prompts)

  def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts: features [B, P, C], mask [B, P]; with a negative [B, 2, ..].

    Warns of prompts that cleaning leaves nothing of: their images show anything.
    """
    texts = [self.prompts[index] for index in indices]
    unique = list(dict.fromkeys(texts))
    features, mask = self._encode(unique + [""] * (len(texts) - len(unique)))
    for prompt, any_token in zip(unique, mask.any(axis=1), strict=False):
      if not any_token:
        logging.warning(
          "prompt %r: nothing is left of it after cleaning, which removes addresses,"
          " markup and Chinese characters; its image follows no text",
          prompt[:NAME_LENGTH],
        )  # fmt: skip
    each = [unique.index(text) for text in texts]
    features, mask = features[each], mask[each]
    if not self.negative:
      return features, mask
    other, other_mask = self._negative
    pair = np.stack([features, np.broadcast_to(other, features.shape)], axis=1)
    return pair, np.stack([mask, np.broadcast_to(other_mask, mask.shape)], axis=1)

  def name(self, index: int) -> str:
    return self.prompts[index][:NAME_LENGTH]

  @functools.cached_property
  def _negative(self) -> tuple[np.ndarray, np.ndarray]:
    return self._encode([self.negative])

  def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    e = self.encoder
    ids, mask = e.tokens.rows(texts, self.tokens)
    found = padded_features(e.config, e.params, ids, mask)
    # In training the encoder lies over all hosts, and so does what it returns.
    if not all(x.is_fully_addressable for x in found):
      found = multihost_utils.process_allgather(found, tiled=True)
    return jax.device_get(found)


def read_prompts(spec: str) -> list[str]:
  """Reads FILE.txt, a prompt a line, or FILE.csv or FILE.tsv with `:COLUMN`.

  Without a column it is the one called prompt, caption or text. Files are in UTF-8,
  local or in a bucket. Quotes are CSV's in .csv; in .tsv they are part of the prompt
  unless they are around all of it.

  Raises:
    UserError: no such file or column, no prompts, or what is no text and where.
  """
  match = FILE.fullmatch(spec)
  if not match:
    raise UserError(f"--prompt-file={spec}: expected .txt, .csv or .tsv")
  name, suffix, column = match["name"], match["suffix"].lower(), match["column"]
  path = user_path(name)
  if not path.is_file():
    raise UserError(f"--prompt-file={name}: no such file")
  text = read_text(path)
  if suffix == "txt":
    found = text_lines(text)
  else:
    rows = _csv_rows(text, name) if suffix == "csv" else _tsv_rows(text)
    found = _column(rows, column or "", name)
  prompts = [prompt for line in found if (prompt := line.strip())]
  if not prompts:
    raise UserError(f"--prompt-file={name}: no prompts in it")
  return prompts


def _csv_rows(text: str, name: str) -> Iterator[list[str]]:
  rows = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    yield from rows
  except csv.Error as error:  # a quote that is not closed, or a huge field
    raise UserError(f"--prompt-file={name}: line {rows.line_num}: {error}") from error


def _tsv_rows(text: str) -> Iterator[list[str]]:
  for line in text_lines(text):
    yield [
      field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field
      for field in line.split("\t")
    ]


def _column(rows: Iterator[list[str]], column: str, name: str) -> Iterator[str]:
  columns = next(rows, [])
  wanted = [column] if column else COLUMNS
  known = columns if column else [name.strip().lower() for name in columns]
  index = next((known.index(name) for name in wanted if name in known), None)
  if index is None:
    raise UserError(
      f"--prompt-file={name}: no column {' or '.join(wanted)}; its columns are"
      f" {' '.join(', '.join(columns)[:MAX_SHOWN].split())}"
    )
  yield from (row[index] for row in rows if index < len(row))


def write_captions(folder: epath.Path, prompts: Sequence[str]) -> None:
  """Writes captions.txt: line n is the prompt of the n-th image by name."""
  lines = [" ".join(prompt.split()) for prompt in prompts]
  write_text(folder / CAPTIONS, "\n".join(lines) + "\n")
