"""Prompts as conditions of images, and the files that they come in."""

from collections.abc import Iterator, Sequence
import csv
import dataclasses
import functools
import pathlib

import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import write_text
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.text.t5 import padded_features
from llamagen_jax.weights.bundle import Transformer

DELIMITERS = {".csv": ",", ".tsv": "\t"}
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
    """Prompts for a transformer, which must have learned this encoder's features."""
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
    return cls(tuple(prompts), encoder, gpt.config.caption_tokens, negative)

  def __len__(self) -> int:
    return len(self.prompts)

  def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, P, C] and mask [B, P]; pairs of them [B, 2, ..] with a negative."""
    texts = [self.prompts[row] for row in rows]
    unique = list(dict.fromkeys(texts))
    features, mask = self._encode(unique + [""] * (len(texts) - len(unique)))
    places = [unique.index(text) for text in texts]
    features, mask = features[places], mask[places]
    if not self.negative:
      return features, mask
    other, other_mask = self._negative
    pair = np.stack([features, np.broadcast_to(other, features.shape)], axis=1)
    return pair, np.stack([mask, np.broadcast_to(other_mask, mask.shape)], axis=1)

  def name(self, row: int) -> str:
    return self.prompts[row][:NAME_LENGTH]

  @functools.cached_property
  def _negative(self) -> tuple[np.ndarray, np.ndarray]:
    return self._encode([self.negative])

  def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    e = self.encoder
    ids, mask = e.tokens.rows(texts, self.tokens)
    return jax.device_get(padded_features(e.config, e.params, ids, mask))


def read_prompts(spec: str) -> list[str]:
  """Reads FILE.txt, a prompt a line, or FILE.csv or FILE.tsv with `:COLUMN`.

  Without a column it is the one called prompt, caption or text.

  Raises:
    UserError: no such file or column, or no prompts in it.
  """
  name, _, column = spec.partition(":")
  path = pathlib.Path(name)
  if path.suffix not in (".txt", *DELIMITERS):
    raise UserError(f"--prompt-file={spec}: expected .txt, .csv or .tsv")
  if not path.is_file():
    raise UserError(f"--prompt-file={name}: no such file")
  found = list(_lines(path) if path.suffix == ".txt" else _column(path, column))
  if not found:
    raise UserError(f"--prompt-file={name}: no prompts in it")
  return found


def _lines(path: pathlib.Path) -> Iterator[str]:
  lines = (line.strip() for line in path.read_text("utf-8").splitlines())
  return filter(None, lines)


def _column(path: pathlib.Path, column: str) -> Iterator[str]:
  with path.open(encoding="utf-8", newline="") as file:
    rows = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
    columns = rows.fieldnames or []
    wanted = [column] if column else COLUMNS
    by_name = {name if column else name.lower(): name for name in columns}
    key = next((by_name[name] for name in wanted if name in by_name), None)
    if key is None:
      raise UserError(
        f"--prompt-file={path}: no column {' or '.join(wanted)}; its columns are"
        f" {', '.join(columns)}"
      )
    yield from (text for row in rows if (text := (row[key] or "").strip()))


def write_captions(folder: pathlib.Path, prompts: Sequence[str]) -> None:
  """captions.txt: line n is the prompt of the n-th image by name."""
  lines = [" ".join(prompt.split()) for prompt in prompts]
  write_text(folder / CAPTIONS, "\n".join(lines) + "\n")
