"""Names of classes: the thousand of ImageNet, and what a user calls them.

`imagenet_classes.txt` has a line a class, in the order of the labels: the WordNet
id, which is also the class's folder in the data set, then its name and other names.
"""

from collections.abc import Sequence
import difflib
import functools
import importlib.resources
import re

from llamagen_jax.data.sources import NO_LABEL
from llamagen_jax.errors import UserError

SUGGESTIONS = 5
RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


@functools.cache
def imagenet_classes() -> dict[str, tuple[str, ...]]:
  """WordNet id -> names of the class, the usual one first; in the order of labels."""
  path = importlib.resources.files("llamagen_jax.data") / "imagenet_classes.txt"
  lines = [line.partition(" ") for line in path.read_text("utf-8").splitlines()]
  return {wordnet: tuple(names.split(", ")) for wordnet, _, names in lines}


def imagenet_names() -> tuple[str, ...]:
  """The usual name of each of the 1000 classes."""
  return tuple(names[0] for names in imagenet_classes().values())


def shown_name(class_names: Sequence[str], label: int) -> str:
  """What to write next to an image; folders named by WordNet ids are translated.

  Nothing next to one that has no label.
  """
  if label == NO_LABEL:
    return ""
  name = class_names[label] if label < len(class_names) else str(label)
  return imagenet_classes().get(name, (name,))[0]


def to_labels(
  classes: str | Sequence[int | str], class_names: Sequence[str], num_classes: int
) -> list[int]:
  """Indices, ranges and names -> labels in that order.

  Args:
    classes: a text such as `207, 360-362, golden retriever`, or a list of indices
      and such words. A number is always an index.
    class_names: of the model's labels, where it knows any. ImageNet classes
      answer to their other names and WordNet ids too.
    num_classes: labels must be smaller.

  Raises:
    UserError: for an index out of range or a name that is not known, with the
      nearest ones.
  """
  words = classes.split(",") if isinstance(classes, str) else map(str, classes)
  labels: list[int] = []
  for word in filter(None, (word.strip() for word in words)):
    labels += _labels(word, class_names)
  if not labels:
    raise UserError("classes: none given; expected such as 207,360-362,tench")
  outside = [label for label in labels if not 0 <= label < num_classes]
  if outside:
    raise UserError(
      f"class {outside[0]} is out of range: the model has classes 0 .."
      f" {num_classes - 1}"
    )
  return labels


def _labels(word: str, class_names: Sequence[str]) -> Sequence[int]:
  if re.fullmatch(r"-?\d+", word):
    return [int(word)]
  if found := RANGE.fullmatch(word):
    first, last = int(found[1]), int(found[2])
    if first > last:
      raise UserError(f"class range {word}: its end is before its start")
    return range(first, last + 1)
  by_name = _by_name(tuple(class_names))
  if word.casefold() in by_name:
    return [by_name[word.casefold()]]
  nearest = _nearest(word.casefold(), by_name)
  known = f"; the nearest are {nearest}" if nearest else ""
  hint = known or "; the model knows no such name, expected indices, such as 207,360"
  raise UserError(f"no class is called {word!r}{hint}")


@functools.cache
def _by_name(class_names: tuple[str, ...]) -> dict[str, int]:
  by_name: dict[str, int] = {}
  for label, name in enumerate(class_names):
    by_name.setdefault(name.casefold(), label)
  # Other names give way to a class's own.
  usual = dict(zip(imagenet_names(), imagenet_classes(), strict=True))
  for label, name in enumerate(class_names):
    wordnet = usual.get(name, name)
    for other in (wordnet, *imagenet_classes().get(wordnet, ())):
      by_name.setdefault(other.casefold(), label)
  return by_name


def _nearest(word: str, by_name: dict[str, int]) -> str:
  """Names that hold the word, then names that are spelled alike."""
  inside = sorted((name for name in by_name if word in name), key=len)
  alike = difflib.get_close_matches(word, by_name, n=SUGGESTIONS, cutoff=0.6)
  found = list(dict.fromkeys([*inside[:SUGGESTIONS], *alike]))[:SUGGESTIONS]
  return ", ".join(f"{name} ({by_name[name]})" for name in found)
