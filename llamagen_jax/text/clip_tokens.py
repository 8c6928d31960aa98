"""CLIP's tokenizer, from any of the files that it comes in.

`tokenizer.json` of the tokenizers library, `vocab.json` and `merges.txt` of
transformers, or OpenAI's `bpe_simple_vocab_16e6.txt`, compressed or not.
"""

from collections.abc import Sequence
import gzip
import json
import os

import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path

START, END = "<|startoftext|>", "<|endoftext|>"
OPENAI = "bpe_simple_vocab_16e6.txt"
OPENAI_MERGES = 48_894  # the file has more, which the published models do not know
# Contractions, runs of letters, single digits, runs of anything else.
PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
  r"|[^\s\p{L}\p{N}]+"
)


class ClipTokens:
  """Prompts -> token ids."""

  def __init__(self, tokenizer, source: os.PathLike):
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
    self._start, self._end = (tokenizer.token_to_id(x) for x in (START, END))
    if self._start is None or self._end is None:
      raise UserError(f"{source}: no CLIP tokenizer, as it has no {START} or {END}")

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "ClipTokens":
    """Opens the first of the files that a folder has, local or in a bucket.

    Raises:
      UserError: none is there, or it is no tokenizer of CLIP.
    """
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(f"{folder} needs pip install -e '.[text]' ({error})") from error
    folder = user_path(folder)
    paths = [folder / name for name in ("tokenizer.json", "vocab.json", OPENAI)]
    paths.append(folder / f"{OPENAI}.gz")
    path = next((path for path in paths if path.exists()), None)
    if path is None:
      names = ", ".join(path.name for path in paths)
      raise UserError(f"{folder}: no tokenizer; expected one of {names}")
    try:
      if path.name == "tokenizer.json":
        return cls(tokenizers.Tokenizer.from_str(_text(path)), path)
      if path.name == "vocab.json":
        vocabulary = json.loads(_text(path))
        merges = _merges(_text(folder / "merges.txt"))
      else:
        merges = _merges(_text(path))[:OPENAI_MERGES]
        vocabulary = _vocabulary(merges)
      return cls(_build(vocabulary, merges), path)
    except UserError:
      raise
    except Exception as error:  # the library raises bare exceptions
      raise UserError(f"{path}: not a tokenizer ({error})") from error

  def rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 ids [B, length], zeros behind the end, and the end's index [B].

    A text that is too long is cut, and still ends.
    """
    ids, ends = np.zeros((len(texts), length), np.int32), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
      tokens = [self._start, *tokens[: length - 2], self._end]
      ids[row, : len(tokens)], ends[row] = tokens, len(tokens) - 1
    return ids, ends


def _text(path) -> str:
  data = path.read_bytes()
  return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def _merges(text: str) -> list[tuple[str, str]]:
  lines = text.splitlines()
  if lines and (lines[0].startswith("#version") or lines[0].startswith('"bpe_simple')):
    lines = lines[1:]
  return [tuple(line.split()) for line in lines if len(line.split()) == 2]


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
  """Numbers tokens as OpenAI does: bytes, bytes that end a word, merges, specials."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  signs = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
  tokens = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges)]
  return {token: i for i, token in enumerate([*tokens, START, END])}


def _build(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]):
  from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

  tokenizer = Tokenizer(
    models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END)
  )
  tokenizer.normalizer = normalizers.Sequence([
    normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Lowercase(),
  ])  # fmt: skip
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])  # fmt: skip
  tokenizer.add_special_tokens([START, END])
  return tokenizer
