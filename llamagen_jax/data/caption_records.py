"""Records of images with captions as files hold them, and the fields of these."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any

from etils import epath

from llamagen_jax.data.file_names import escape
from llamagen_jax.data.sources import image_path, read_image
from llamagen_jax.errors import UserError
from llamagen_jax.storage import decode_text

# Fields that are looked for if no flag names one.
CAPTION_KEYS = ("caption", "text", "TEXT", "top_caption", "prompt", "captions")
SHOWN_FIELDS = 20  # names of fields in a message


@dataclasses.dataclass(frozen=True)
class FieldNames:
  """Names of fields; empty = the usual ones."""

  caption_key: str = ""
  short_key: str = ""
  image_key: str = ""


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
  """An image file with a caption, or why it cannot be used: "reason: detail"."""

  key: str
  source: str
  image: bytes = b""
  caption: str = ""
  short: str = ""
  problem: str = ""

  def __post_init__(self):
    for name in ("key", "source", "problem"):
      object.__setattr__(self, name, escape(getattr(self, name)))


class Unusable(Exception):
  """A record without an image or caption; the message is "reason: detail"."""


def image_of(root: epath.Path, name: Any) -> bytes:
  """Reads the image file that a list names; raises Unusable."""
  try:
    image, problem = read_image(image_path(root, name))
  except ValueError as error:
    raise Unusable(f"missing images: {error}") from error
  if problem:
    raise Unusable(f"missing images: {name}: {problem}")
  return image


def decode_caption(text: bytes, name: str) -> str:
  """Decodes a caption's file in UTF-8; raises Unusable."""
  try:
    return decode_text(text, name)
  except UserError as error:
    raise Unusable(f"broken texts: {error}") from error


def with_captions(
  record: CaptionedImage, fields: Mapping[str, Any], keys: FieldNames
) -> Iterator[CaptionedImage]:
  """Gives an image its captions; a list of them makes several records.

  Raises:
    Unusable: before the first record, for a caption that is missing, empty or no text.
  """
  captions = _captions(fields, keys)
  short = fields.get(keys.short_key) if keys.short_key else None
  shorts = _texts(short, keys.short_key) if short else [""]
  for i, caption in enumerate(captions):
    key = record.key if len(captions) == 1 else f"{record.key}-{i}"
    yield dataclasses.replace(record, key=key, caption=caption, short=shorts[0])


def _captions(fields: Mapping[str, Any], keys: FieldNames) -> list[str]:
  names = (keys.caption_key,) if keys.caption_key else CAPTION_KEYS
  present = [name for name in names if name in fields]
  if not present:
    raise Unusable(
      f"missing captions: no {' or '.join(names)} among {listed(fields)};"
      " --caption-key names one"
    )
  name = next((name for name in present if fields[name]), present[0])
  if fields[name] is None or fields[name] == []:
    raise Unusable(f"missing captions: {name} is {json.dumps(fields[name])}")
  captions = _texts(fields[name], name)
  if not all(caption.strip() for caption in captions):
    raise Unusable(f"empty captions: {name}")
  return captions


def _texts(value: Any, name: str) -> list[str]:
  """Returns the texts of a field: one, or those of a list."""
  texts = value if isinstance(value, list) and value else [value]
  if not all(isinstance(text, str) for text in texts):
    raise Unusable(f"broken texts: {name} is {value!r:.80}, expected text")
  try:
    "".join(map(str, texts)).encode()
  except UnicodeEncodeError as error:
    raise Unusable(f"broken texts: {name} holds half a surrogate pair") from error
  return texts


def listed(names: Iterable[Any]) -> str:
  """Lists names of fields for a message, the first of many."""
  names = [*names]
  more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
  return (", ".join(map(str, names[:SHOWN_FIELDS])) or "nothing") + more
