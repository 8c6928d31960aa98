import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llamagen_jax import UserError
from llamagen_jax.data.classes import (
  imagenet_classes,
  imagenet_names,
  shown_name,
  to_labels,
)

KNOWN = {
  0: "tench", 1: "goldfish", 88: "macaw", 207: "golden retriever", 279: "Arctic fox",
  291: "lion", 360: "otter", 387: "lesser panda", 388: "giant panda", 417: "balloon",
  517: "crane", 638: "maillot", 639: "tank suit", 817: "sports car", 836: "sunglass",
  837: "sunglasses", 933: "cheeseburger", 949: "strawberry", 963: "pizza",
  974: "geyser", 979: "valley", 980: "volcano", 999: "toilet tissue",
}  # fmt: skip


def test_a_thousand_classes_in_the_order_of_the_data_set():
  folder = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012"
  assert list(imagenet_classes()) == (folder / "labels.txt").read_text().split()
  assert len(imagenet_names()) == 1000
  every = [n.casefold() for names in imagenet_classes().values() for n in names]
  assert len(every) == len(set(every))
  assert all(name == name.strip() and name for name in every)


@pytest.mark.parametrize("label, name", KNOWN.items())
def test_known_classes(label, name):
  assert to_labels(name, imagenet_names(), 1000) == [label]


def test_indices_ranges_names_and_folders_may_be_mixed():
  text = " 207, 0-2,GOLDEN retriever,alsatian ,n01440764,7 - 7"
  labels = to_labels(text, imagenet_names(), 1000)
  assert labels == [207, 0, 1, 2, 207, 235, 0, 7]
  folders = sorted(imagenet_classes())[:3]
  assert to_labels("goldfish,1", folders, 3) == [1, 1]
  assert [shown_name(folders, i) for i in (0, 2)] == ["tench", "great white shark"]


def test_a_models_own_names_come_first():
  names = ["one, or two", "0", "crane"]
  assert to_labels("0,crane,2", names, 3) == [0, 2, 2]
  assert to_labels(["one, or two", 1, np.int32(2)], names, 3) == [0, 1, 2]
  assert [shown_name(names, 1), shown_name((), 5)] == ["0", "5"]


@pytest.mark.parametrize(
  "text, words",
  [
    ("golden retreiver", "'golden retreiver'.*golden retriever \\(207\\)"),
    ("giant pand", "giant panda \\(388\\)"),
    ("xyzzy", "'xyzzy'; the model knows no such name"),
    ("1000", "class 1000 is out of range.* 0 .. 999"),
    ("-1", "class -1 is out of range"),
    ("990-1001", "class 1000 is out of range"),
    ("9-3", "end is before its start"),
    (" , ", "none given"),
  ],
)
def test_what_is_not_a_class_is_named(text, words):
  with pytest.raises(UserError, match=words):
    to_labels(text, imagenet_names(), 1000)
