"""Names of classes: the thousand of ImageNet, and the words that users know them by.

`imagenet_classes.txt` has a line a class, in the order of the labels: the WordNet
id, which is also the class's folder in the data set, then its name and other names.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import importlib.resources
import re
from typing import Any

from absl import logging

from llamagen_jax.data.sources import NO_LABEL
from llamagen_jax.errors import UserError
from llamagen_jax.storage import text_lines

SUGGESTIONS = 5
MAX_RANGE = 100_000  # classes that one range may stand for
MAX_SHOWN = 100  # characters of an unknown name
RANGE = re.compile(r"([0-9]{1,18})\s*-\s*([0-9]{1,18})")


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
  """Returns the name to write next to an image; "" where it has no label.

  Folders named by WordNet ids are translated.
  """
  if label == NO_LABEL:
    return ""
  name = class_names[label] if label < len(class_names) else str(label)
  return imagenet_classes().get(name, (name,))[0]


def to_labels(
  classes: str | Sequence[int | str], class_names: Sequence[str], num_classes: int
) -> list[int]:
  """Names, indices and ranges -> labels in that order.

  Args:
    classes: a text such as `207, 360-362, golden retriever`, of one or more lines, or a
      list of indices and of such names and ranges. A text is a name if there is one,
      even if it has commas (`Food, Drink`) or looks like an index (`10`) or range
      (`3-5`); an integer in a list is an index.
    class_names: of the model's labels, where it knows any. ImageNet classes have
      their other names and WordNet ids too.
    num_classes: labels must be smaller.

  Raises:
    UserError: an index out of range, or an unknown name, with the nearest ones.
  """
  names = _Names.of(tuple(class_names))
  words = classes
  if isinstance(classes, str):
    words = [w for line in text_lines(classes) for w in _split(line, names)]
  labels: list[int] = []
  for word in words:
    labels += _labels(word.strip(), names) if isinstance(word, str) else [int(word)]
  if not labels:
    raise UserError("classes: none given; expected such as 207,360-362,tench")
  outside = [label for label in labels if not 0 <= label < num_classes]
  if outside:
    raise UserError(
      f"class {outside[0]} is out of range: the model has classes 0 .."
      f" {num_classes - 1}"
    )
  return labels


def to_label(word: int | str, class_names: Sequence[str], num_classes: int) -> int:
  """One index or name -> its label; raises UserError as `to_labels` does."""
  labels = to_labels([word], class_names, num_classes)
  if len(labels) > 1:
    raise UserError(f"{word}: expected one class, an index or a name")
  return labels[0]


@dataclasses.dataclass(frozen=True)
class _Names:
  """Names of classes -> labels; usual names first, in any case second."""

  exact: dict[str, int]
  in_any_case: dict[str, int]
  most_commas: int  # in a name

  @classmethod
  @functools.cache
  def of(cls, class_names: tuple[str, ...]) -> "_Names":
    exact: dict[str, int] = {}
    for label, name in enumerate(class_names):
      exact.setdefault(_normal(name), label)
    in_any_case = {}
    for name, label in exact.items():
      in_any_case.setdefault(name.casefold(), label)
    # Other names give way to a class's own.
    usual = dict(zip(imagenet_names(), imagenet_classes(), strict=True))
    for label, name in enumerate(class_names):
      wordnet = usual.get(name, name)
      for other in (wordnet, *imagenet_classes().get(wordnet, ())):
        in_any_case.setdefault(_normal(other).casefold(), label)
    most = max((name.count(",") for name in in_any_case), default=0)
    return cls(exact, in_any_case, most)

  def find(self, word: str) -> int | None:
    """Returns the label of a name, or None."""
    word = _normal(word)
    return self.exact.get(word, self.in_any_case.get(word.casefold()))


def _normal(name: str) -> str:
  """A name with single spaces, none around it, and one after every comma."""
  return ", ".join(" ".join(word.split()) for word in name.split(","))


def _split(line: str, names: _Names) -> list[str]:
  """Splits a line at commas, but not within a name; the longest name counts."""
  words, found, i = line.split(","), [], 0
  while i < len(words):
    longest = min(names.most_commas + 1, len(words) - i)
    sizes = (n for n in range(longest, 0, -1))
    size = next(
      (n for n in sizes if names.find(",".join(words[i : i + n])) is not None), 1
    )
    found.append(",".join(words[i : i + size]))
    i += size
  return [word for word in found if word.strip()]


def _labels(word: str, names: _Names) -> Sequence[int]:
  label, index = names.find(word), re.fullmatch(r"-?[0-9]{1,18}", word)
  span = RANGE.fullmatch(word)
  if label is not None:
    if (index and int(word) != label) or span:
      logging.warning(
        "class %s: taken as the name of class %d, not as an index or range", word, label
      )
    return [label]
  if index:
    return [int(word)]
  if span:
    first, last = int(span[1]), int(span[2])
    if first > last:
      raise UserError(f"class range {word}: its end is before its start")
    if last - first >= MAX_RANGE:
      raise UserError(f"class range {word}: expected at most {MAX_RANGE} classes")
    return range(first, last + 1)
  shown = word[:MAX_SHOWN]
  nearest = _nearest(shown.casefold(), names.in_any_case)
  known = f"; the nearest are {nearest}" if nearest else ""
  hint = known or "; the model knows no such name, expected indices, such as 207,360"
  raise UserError(f"no class is called {shown!r}{hint}")


def match_classes(
  names: Sequence[str], other: Sequence[str], owner: str, other_owner: str
) -> list[int] | None:
  """Compares the class names of two data sets, in the order of their labels.

  Args:
    names: of the set that the model learns.
    other: of the set that is to have the same labels.
    owner: names the first set in messages.
    other_owner: names the second.

  Returns:
    the first set's label of each label of the second, or None where they are the same
    or a set has no names.

  Raises:
    UserError: the second set has a class that the first has not.
  """
  if not names or not other or list(names) == list(other):
    return None
  labels = {name: label for label, name in enumerate(names)}
  missing = [name for name in other if name not in labels]
  if missing:
    more = ", .." if len(names) > SUGGESTIONS else ""
    known = ", ".join(names[:SUGGESTIONS]) + more
    raise UserError(
      f"{other_owner}: {len(missing)} of its {len(other)} classes, such as"
      f" {missing[0]!r}, are not among those of {owner}: {known}"
    )
  logging.warning(
    "%s has other labels than %s: mapped by the names of classes", other_owner, owner
  )
  return [labels[name] for name in other]


def _nearest(word: str, by_name: dict[str, int]) -> str:
  """Lists names that hold the word, then names that are spelled alike."""
  inside = sorted((name for name in by_name if word in name), key=len)
  alike = difflib.get_close_matches(word, by_name, n=SUGGESTIONS, cutoff=0.6)
  found = list(dict.fromkeys([*inside[:SUGGESTIONS], *alike]))[:SUGGESTIONS]
  return ", ".join(f"{name} ({by_name[name]})" for name in found)


@dataclasses.dataclass(frozen=True)
class Relabelled:
  """A source whose records have the labels that `match_classes` returns."""

  source: Any
  labels: Sequence[int]

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Any:
    record = self.source[index]
    if record.label == NO_LABEL:
      return record
    return dataclasses.replace(record, label=self.labels[record.label])
