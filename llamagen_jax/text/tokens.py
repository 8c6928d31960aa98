"""Captions to token ids, with the tokenizer that a T5 folder holds."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import os

from etils import epath
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.storage import user_path
from llamagen_jax.text.caption import clean

SENTENCEPIECE = "spiece.model"
TOKENIZERS = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class CaptionTokens:
  """Cleans captions and cuts them into tokens, as T5 was trained to read them.

  Picklable: workers that read data open the file of their own.
  """

  path: epath.Path
  size: int
  pad: int
  end: int  # of </s>, which ends every caption
  identity: str  # sha256 of the file

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "CaptionTokens":
    """Opens spiece.model, or else tokenizer.json, of a local folder or a bucket's."""
    for name in (SENTENCEPIECE, TOKENIZERS):
      path = user_path(folder) / name
      if path.exists():
        size, pad, end = _open(path)[1:]
        return cls(path, size, pad, end, hashlib.sha256(path.read_bytes()).hexdigest())
    raise UserError(f"{folder}: no tokenizer; expected {SENTENCEPIECE} or {TOKENIZERS}")

  def ids(self, caption: str, length: int) -> list[int]:
    """Returns the tokens of a caption as it is, at most `length` with their `</s>`."""
    return [*_open(self.path)[0](caption)[: length - 1], self.end]

  def row(self, caption: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a cleaned caption's int32 ids and mask [length], padded on the right.

    The mask of a caption that cleaning empties is zeros.
    """
    caption = clean(caption)
    tokens = self.ids(caption, length) if caption else []
    ids = np.full(length, self.pad, np.int32)
    ids[: len(tokens)] = tokens
    return ids, (np.arange(length) < len(tokens)).astype(np.int32)

  def rows(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `row` of several captions, both [B, length]."""
    ids, masks = zip(*(self.row(c, length) for c in captions), strict=True)
    return np.stack(ids), np.stack(masks)


@functools.lru_cache(maxsize=4)
def _open(path: epath.Path) -> tuple[Callable[..., list[int]], int, int, int]:
  """Returns text -> ids, the number of tokens, and the ids of <pad> and </s>."""
  try:
    if path.name == SENTENCEPIECE:
      import sentencepiece

      model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
      encode = model.encode  # pyright: ignore[reportAssignmentType]
      size = model.get_piece_size()
      pad, end = model.pad_id(), model.eos_id()
    else:
      import tokenizers

      fast = tokenizers.Tokenizer.from_buffer(path.read_bytes())
      fast.no_truncation()
      fast.no_padding()
      size = fast.get_vocab_size()
      pad, end = fast.token_to_id("<pad>"), fast.token_to_id("</s>")

      def encode(text):
        return fast.encode(text, add_special_tokens=False).ids
  except ImportError as error:
    raise UserError(f"{path} needs pip install -e '.[text]' ({error})") from error
  except Exception as error:  # both libraries raise bare exceptions
    raise UserError(f"{path}: not a tokenizer ({error})") from error
  if pad is None or end is None or min(pad, end) < 0:
    raise UserError(f"{path}: no <pad> or no </s> among its tokens")
  return encode, size, pad, end
