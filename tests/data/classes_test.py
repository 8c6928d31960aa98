import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llamagen_jax import UserError
from llamagen_jax.data.classes import (
  Relabelled,
  imagenet_classes,
  imagenet_names,
  match_classes,
  shown_name,
  to_label,
  to_labels,
)
from llamagen_jax.data.sources import ImageRecord

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
  assert to_labels(["one, or two", 1, np.int32(2)], names, 3) == [0, 1, 2]
  assert [shown_name(names, 1), shown_name((), 5)] == ["0", "5"]


@pytest.mark.parametrize(
  "text, labels",
  [
    ("Food, Drink", [0]),
    ("food,drink , 3-5,ox", [0, 1, 2]),
    ("Food,ox", [4, 2]),
    ("10", [5]),
    ("1, 0-1", [1, 0, 1]),
    ("OX, Ox, ox", [3, 2, 2]),
    ("Food\nDrink, ox", None),
    ("Food\r\n\r\n 3-5 ", [4, 1]),
    (["Food, Drink", 10 - 9, "10"], [0, 1, 5]),
  ],
)
def test_an_exact_name_comes_before_indices_and_ranges(text, labels):
  names = ("Food, Drink", "3-5", "ox", "OX", "Food", "10")
  if labels is None:  # a name does not go over the end of a line
    with pytest.raises(UserError, match="'Drink'"):
      to_labels(text, names, 6)
  else:
    assert to_labels(text, names, 6) == labels


def test_one_class():
  assert to_label("Food, Drink", ("a", "Food, Drink", "3-5"), 3) == 1
  assert to_label("3-5", ("a", "Food, Drink", "3-5"), 3) == 2
  assert to_label(0, ("1", "0"), 2) == 0 and to_label("0", ("1", "0"), 2) == 1
  for word in ("0-1", "", "1,0", 2, "-1"):
    with pytest.raises(UserError):
      to_label(word, ("a", "b"), 2)


def test_a_name_that_might_be_an_index_is_said(caplog):
  names = ("one", "0", "3-5")
  assert to_labels("0, 2, 3-5", names, 3) == [1, 2, 2]
  assert "class 0: taken as the name of class 1, not as an index" in caplog.text
  assert "class 3-5: taken as the name of class 2" in caplog.text
  caplog.clear()
  assert to_labels("0,1,2", [str(i) for i in range(3)], 3) == [0, 1, 2]
  assert not caplog.text


def test_labels_of_another_set_are_mapped_by_the_names(caplog):
  assert match_classes("abc", "abc", "train", "val") is None
  assert match_classes("abc", (), "train", "val") is None
  assert match_classes("abc", "cb", "train", "val") == [2, 1]
  assert "val has other labels than train: mapped by the names" in caplog.text
  with pytest.raises(UserError, match="^val: 1 of its 3 classes, such as 'd', .*train"):
    match_classes("abc", "bcd", "train", "val")
  records = [ImageRecord("x", b"", label) for label in (0, 1, -1)]
  assert [r.label for r in Relabelled(records, [2, 1])] == [2, 1, -1]


@pytest.mark.parametrize(
  "text, words",
  [
    ("x" * 10**5, "no class is called 'x{100}'; the model"),
    ("0-99999999999", "at most 100000 classes"),
    ("9" * 10**5, "no class is called '9{100}'"),
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
