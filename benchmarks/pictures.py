"""Small picture sets that tokenizers are compared on, each with its own judge.

A judge is fitted on real training pictures and never sees one that a model made.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib

import numpy as np
from PIL import Image

from llamagen_jax.commands import emoji_judge, quickstart
from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.commands.quickstart_emoji import JUDGE_EPOCHS
from llamagen_jax.data.emoji import write_emoji
from llamagen_jax.data.images import CropSet


@dataclasses.dataclass(frozen=True)
class Pictures:
  """A set of 32x32 pictures in classes.

  Attributes:
    folder: has the splits `train` and `val`, each a folder of classes.
    classes: their names, sorted.
    held_out: uint8 [N, 32, 32, 3] that no model is trained on.
    read: uint8 pictures -> the class that each one looks like [N], features [N, F].
    max_resize: of the crops that a tokenizer is trained on.
    crops: what codes are extracted from.
  """

  folder: pathlib.Path
  classes: tuple[str, ...]
  held_out: np.ndarray
  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  max_resize: float
  crops: CropSet


def digits(out: pathlib.Path) -> Pictures:
  """Writes the quickstart's digits to `out`, which a small network then reads."""
  quickstart.write_digits(out / "digits", quickstart.FULL.digits)
  train, test = (quickstart.load_digits(out, split) for split in ("train", "test"))
  read = functools.partial(classify, fit_classifier(*train, epochs=6, seed=0))
  crops = CropSet(quickstart.SIDE, "five", (1.1,), mirror=False)
  return Pictures(out / "digits", tuple("0123456789"), test[0], read, 1.2, crops)


def emoji(out: pathlib.Path) -> Pictures:
  """Writes OpenMoji to `out`; a class is a group of Unicode's, such as food-drink.

  A made emoji is read as the group of the training emoji that it is nearest to. Held
  out are the names, skin tones and colours that `quickstart --emoji` holds out.
  """
  folder = out / "emoji"
  write_emoji(folder, quickstart.SIDE)
  classes = tuple(sorted(path.name for path in (folder / "train").iterdir()))
  train, labels = load(folder / "train", classes)
  held_out = [load(folder / s, classes)[0] for s in ("val", "tones", "colours")]
  judge = emoji_judge.fit(train, epochs=JUDGE_EPOCHS, seed=0)
  known = emoji_judge.features(judge, train)

  def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = emoji_judge.features(judge, images)
    return labels[np.argmax(found @ known.T, axis=1)], found

  # As drawn: resized to 1.1 they lose their outlines.
  crops = CropSet(quickstart.SIDE, "center", (1.0,), mirror=False)
  return Pictures(folder, classes, np.concatenate(held_out), read, 1.0, crops)


def load(
  folder: pathlib.Path, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns uint8 pictures [N, 32, 32, 3] of a split and their classes [N]."""
  paths = sorted(folder.glob("*/*.png"))
  images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
  return images, np.array([classes.index(path.parent.name) for path in paths])
