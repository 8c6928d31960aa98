"""Names of files: which are images, which are junk, their order, and patterns."""

import collections
from collections.abc import Iterable, Iterator
import glob
import itertools
import os
import re

from absl import logging
from etils import epath

from llamagen_jax.errors import UserError
from llamagen_jax.storage import BUCKET, in_bucket, user_path

IMAGE_SUFFIXES = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif",
  ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Files and folders that operating systems and network disks leave beside images.
JUNK = (
  "__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found",
  "$recycle.bin", "#recycle", "@recycle", "system volume information",
)  # fmt: skip
MAX_EXPANSIONS = 1_000_000  # files that one pattern with braces may stand for
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
MAX_KEY = 1024  # characters; shards store the length of a key in 16 bits


def is_image(name: str) -> bool:
  """Returns whether a file's name ends like an image's, in any case."""
  return name.lower().endswith(IMAGE_SUFFIXES)


def is_junk(path: str) -> bool:
  """Returns whether a part of a path begins with a dot or is a system's leftover."""
  return any(
    part.lower() in JUNK or (part.startswith(".") and part.strip("."))
    for part in path.split("/")
  )


def natural_order(paths: Iterable[str]) -> list[str]:
  """Sorts paths folder by folder, digits as numbers: 2.png before 10.png."""
  return sorted(paths, key=lambda path: ([*map(_natural, path.split("/"))], path))


def _natural(name: str) -> list:
  words = re.split("([0-9]+)", name)  # text at even indices, digits at odd ones
  digits = [word.lstrip("0") for word in words[1::2]]
  words[1::2] = [(len(word), word) for word in digits]
  return words


def escape(name: str) -> str:
  """Makes a name printable and storable: odd characters become \\xNN or \\uNNNN.

  Those are control characters, and bytes that are not UTF-8, which Python reads as
  lone surrogates and cannot encode.
  """

  def escaped(match: re.Match) -> str:
    code = ord(match[0])
    if 0xDC80 <= code < 0xDD00:  # a byte, as os.fsdecode marks it
      code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

  return re.sub("[\0-\x1f\x7f\ud800-\udfff]", escaped, name[:MAX_KEY])[:MAX_KEY]


def list_images(root: epath.Path) -> list[str]:
  """Lists the images in a folder and its folders, relative to it, in natural order.

  Junk is passed over; other files are counted by their suffix in the log.
  """
  images, others = [], collections.Counter()
  for path in _files_below(root):
    if is_image(path):
      images.append(path)
    else:
      others[os.path.splitext(path)[1].lower() or "no suffix"] += 1
  if others:
    counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
    logging.warning("%s: files that are not read as images: %s", root, escape(counts))
  return natural_order(images)


def _files_below(root: epath.Path) -> Iterator[str]:
  """Paths of the files in a folder and its folders, relative to it, without junk."""
  start = len(os.fspath(root).removeprefix(BUCKET).rstrip("/")) + 1
  walk = root.walk() if in_bucket(root) else os.walk(root, followlinks=True)
  for folder, folders, names in walk:
    prefix = os.fspath(folder).removeprefix(BUCKET)[start:]  # etils 1.15 leaves it out
    folders[:] = [
      name
      for name in folders
      if not is_junk(name) and not _is_loop(os.path.join(folder, name))
    ]
    paths = (f"{prefix}/{name}" if prefix else name for name in names)
    yield from (path for path in paths if not is_junk(path))


def _is_loop(folder: str) -> bool:
  """Returns whether a folder is a link to one of the folders that it lies in."""
  if not os.path.islink(folder):
    return False
  target, above = os.path.realpath(folder), os.path.dirname(folder)
  while above != os.path.dirname(above):
    if os.path.realpath(above) == target:
      return True
    above = os.path.dirname(above)
  return False


def expand_files(spec: str, pattern: str) -> tuple[str, ...]:
  """Returns the files that a pattern stands for: `*`, `?`, `{00..12}` and `{a,b}`.

  Args:
    spec: as the user gave it, for messages.
    pattern: local or gs://; every alternative in braces must match a file.
  """
  files = []
  braces = "{" in pattern and not user_path(pattern).exists()
  for single in _alternatives(spec, pattern) if braces else [pattern]:
    found = _matches(single)
    if not found:
      raise UserError(
        f"{spec}: no such file{'' if single == pattern else f' {single}'}"
      )
    for path in found:
      if user_path(path).is_dir():
        raise UserError(f"{spec}: {path} is a folder; expected files, such as {path}/*")
    files += found
  return tuple(files)


def _matches(pattern: str) -> list[str]:
  path = user_path(pattern)
  if not glob.has_magic(pattern) or path.exists():
    return [os.fspath(path)] if path.exists() else []
  if not in_bucket(path):
    return natural_order(glob.glob(os.fspath(path)))
  base = path.parent
  while glob.has_magic(os.fspath(base)):
    base = base.parent
  below = os.fspath(path).removeprefix(f"{base}/").replace("**", "*")
  return natural_order(map(os.fspath, base.glob(below)))


def _alternatives(spec: str, pattern: str) -> list[str]:
  """Expands braces as shells and webdataset do."""
  groups = BRACES.split(pattern)  # text at even indices, the braces' at odd ones
  options = [[text] for text in groups]
  count = 1
  for i in range(1, len(groups), 2):
    if bounds := RANGE.fullmatch(groups[i]):
      first, last = int(bounds[1]), int(bounds[2])
      width = len(bounds[1]) if bounds[1].startswith("0") else 0
      count *= max(0, last - first + 1)
      if 0 < count <= MAX_EXPANSIONS:
        options[i] = [f"{n:0{width}d}" for n in range(first, last + 1)]
    else:
      options[i] = groups[i].split(",")
      count *= len(options[i])
    if not 0 < count <= MAX_EXPANSIONS:
      raise UserError(
        f"{spec}: {{{groups[i]}}} makes {count} files, expected 1 to {MAX_EXPANSIONS}"
      )
  return ["".join(texts) for texts in itertools.product(*options)]
