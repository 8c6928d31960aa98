"""Names of files: images, junk, order, patterns."""

import os
import random

from etils import epath
import pytest

from llamagen_jax.data.file_names import (
  escape,
  expand_files,
  is_junk,
  list_images,
  natural_order,
)
from llamagen_jax.errors import UserError


@pytest.mark.parametrize(
  "name",
  [
    ".ipynb_checkpoints", "__MACOSX/a.jpg", "a/@eaDir/x.jpg", "._x.jpg", "Thumbs.db",
    "b/desktop.ini", ".DS_Store", "$RECYCLE.BIN/x.png", "./._0.jpg",
  ],
)  # fmt: skip
def test_what_systems_leave_behind_is_junk(name):
  assert is_junk(name)


@pytest.mark.parametrize("name", ["./0.jpg", "../a/b.png", "a.b", "thumbs", "MACOSX"])
def test_other_names_are_not(name):
  assert not is_junk(name)


def test_digits_sort_as_numbers_and_folders_stay_together():
  ordered = [
    "1.png", "2.png", "10.png", "a/1.png", "a/02.png", "a/2.png", "a/10/1.png",
    "a-b/1.png", "b2", "b10", "b10c1", "b10c20",
  ]  # fmt: skip
  for seed in range(5):
    shuffled = random.Random(seed).sample(ordered, len(ordered))
    assert natural_order(shuffled) == ordered


def test_names_that_cannot_be_encoded_or_printed_are_escaped():
  assert escape(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
  assert escape("a\0b\x1b\n\ud83d") == r"a\x00b\x1b\x0a\ud83d"
  assert escape("größe/猫 1.png") == "größe/猫 1.png"
  assert len(escape("x" * 10**6)) == len(escape("\0" * 10**6)) == 1024


def test_images_are_listed_and_other_files_counted(tmp_path, caplog):
  files = (
    "2.JPG", "10.gif", "a/1.jfif", "a/b/1.tiff", "a/1.avif", "a/._1.jpg", "x.jp2",
    ".git/1.png", "notes.txt", "y.heic", "z.heic",
  )  # fmt: skip
  for name in files:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  (tmp_path / "loop").symlink_to(tmp_path)
  (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
  assert list_images(epath.Path(tmp_path)) == [
    "2.JPG", "10.gif", "a/1.avif", "a/1.jfif", "a/b/1.tiff",
    "linked/1.tiff", "x.jp2",
  ]  # fmt: skip
  assert "not read as images: 2 .heic, 1 .txt" in caplog.text


def test_patterns(tmp_path):
  for i in (1, 2, 10):
    (tmp_path / f"{i}.tar").touch()
  for name in ("00000.tgz", "00001.tgz", "{x}.tar", "[y].tar"):
    (tmp_path / name).touch()

  def names(pattern):
    files = expand_files("--source=x", f"{tmp_path}/{pattern}")
    return [os.path.basename(file) for file in files]

  assert names("?.tar") == ["1.tar", "2.tar"]
  assert names("[0-9]*.tar") == ["1.tar", "2.tar", "10.tar"]
  assert names("{00000..00001}.tgz") == ["00000.tgz", "00001.tgz"]
  assert names("{1..2}.{tar,tar}") == ["1.tar", "1.tar", "2.tar", "2.tar"]
  assert names("{10,0*}.t*") == ["10.tar", "00000.tgz", "00001.tgz"][:1] + names("0*")
  assert names("{x}.tar") == ["{x}.tar"]
  assert names("[y].tar") == ["[y].tar"]


@pytest.mark.parametrize(
  "pattern, words",
  [
    ("none.tar", "no such file"),
    ("*.none", "no such file"),
    ("{0..1}.tar", "no such file .*/0.tar"),
    ("{0..99999999}.tar", "makes 100000000 files"),
    ("{2..1}.tar", "makes 0 files"),
    ("", "is a folder; expected files"),
    ("*", "d is a folder; expected files"),
  ],
)
def test_patterns_without_a_file_are_refused(tmp_path, pattern, words):
  (tmp_path / "1.tar").touch()
  (tmp_path / "d").mkdir()
  with pytest.raises(UserError, match=f"--source=x: .*{words}"):
    expand_files("--source=x", f"{tmp_path}/{pattern}")
