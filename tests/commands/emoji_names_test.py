"""The text encoder of the emoji quickstart, fitted on coloured halves of images."""

import numpy as np
import pytest

pytest.importorskip("sentencepiece")

from llamagen_jax.commands import emoji_names  # noqa: E402
from llamagen_jax.commands.quickstart_text import write_t5  # noqa: E402
from llamagen_jax.text.t5 import T5Config, encode  # noqa: E402
from llamagen_jax.weights.t5 import load_t5  # noqa: E402

COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220)}
PLACES = {"left": np.s_[:, :16], "right": np.s_[:, 16:], "top": np.s_[:16]}
NAMES = [f"{colour} {place}" for colour in COLOURS for place in PLACES]
CONFIG = T5Config(60, dim=16, layers=1, heads=2, head_dim=8, ffn_dim=32)
UNSEEN = NAMES.index("green top")


def images() -> np.ndarray:
  """Images of NAMES, a coloured half on white, uint8 [9, 32, 32, 3]."""
  drawn = np.full((len(NAMES), 32, 32, 3), 255, np.uint8)
  for image, name in zip(drawn, NAMES, strict=True):
    colour, place = name.split()
    image[PLACES[place]] = COLOURS[colour]
  return drawn


def test_cells_are_patches_of_the_coarse_image_without_what_is_common():
  cells = emoji_names.coarse_cells(images())
  assert cells.shape == (9, 64, 12)
  np.testing.assert_allclose(cells.mean(axis=0), 0, atol=1e-5)
  assert cells.std() == pytest.approx(1, rel=1e-4)
  columns = cells[0].reshape(8, 8, 12)[4]  # the left half is red
  assert np.abs(columns[0] - columns[2]).max() < 1e-5
  assert np.abs(columns[2] - columns[5]).max() > 0.5


def test_a_name_that_was_not_seen_is_read_from_its_words(tmp_path):
  seen = [n for n in range(len(NAMES)) if n != UNSEEN]
  names, fitted = [NAMES[n] for n in seen], []

  def weights(config, tokens):
    fitted.append(
      emoji_names.fit(config, tokens, names, images()[seen], epochs=300, seed=0)
    )
    return emoji_names.encoder(fitted[0])

  write_t5(tmp_path / "t5", CONFIG, names, weights)
  t5 = load_t5(tmp_path / "t5", dtype="float32")
  ids, mask = t5.tokens.rows(["a green top"], 8)
  reader = emoji_names.NameReader(CONFIG)
  found = reader.apply({"params": fitted[0]}, ids, mask)
  cells = emoji_names.coarse_cells(images())
  distances = np.sum((np.asarray(found) - cells) ** 2, axis=(1, 2))
  assert distances.argmin() == UNSEEN
  features = np.asarray(encode(CONFIG, t5.params, ids, mask))[:, :4]
  assert np.sqrt(np.mean(features**2)) > 2  # as the transformer's embedder likes them
