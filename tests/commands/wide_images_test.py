"""Pairs of shapes, twice as wide as high: codes, a transformer, samples and edits."""

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import load_tokenizer
from llamagen_jax.commands import cli
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.images import to_uint8
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

PAIRS = ("left", "right"), ("right", "left")
COPIES = 6
STEPS = 80


def pair(names: tuple[str, str]) -> np.ndarray:
  """Two shapes of 8x8 pixels side by side, uint8 [8, 16, 3]."""
  shape = np.zeros((8, 8, 3), np.uint8)
  shape[1:7, 1:4] = (255, 160, 40)
  shapes = {"left": shape, "right": shape[:, ::-1] // 2}
  return np.concatenate([shapes[name] for name in names], axis=1)


@pytest.mark.slow
def test_a_trained_model_draws_its_pairs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  images = np.stack([pair(names) for names in PAIRS])
  for label, image in enumerate(images):
    folder = tmp_path / "images" / f"pair{label}"
    folder.mkdir(parents=True)
    for copy in range(COPIES):
      Image.fromarray(image).save(folder / f"{copy}.png")
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  bundle.save_tokenizer(tmp_path / "vq", tiny.TOKENIZER, params)
  tokenizer = load_tokenizer(tmp_path / "vq")
  expected = np.asarray(to_uint8(tokenizer.decode(tokenizer.encode(images))))
  assert (expected[0] != expected[1]).any()

  def run(verb: str, flags: str) -> None:
    assert cli.run([verb, *flags.split()]) == 0, capsys.readouterr().err

  run(
    "extract-codes",
    "--tokenizer=vq --source=folder:images --image-size=16x8 --crops=center --ranges=1"
    " --no-mirror --shards=2 --batch-size=4 --min-side=8 --out=codes",
  )
  config = tiny.gpt_config(tmp_path / "codes", STEPS)
  config.model.update(
    vocab_size=16, num_classes=2, drop_path=0.0, condition_dropout=0.0
  )
  config.model.update(embedding_dropout=0.0, residual_dropout=0.0)
  tiny.write_config(tmp_path / "gpt.py", config)
  run("train-gpt", "--config=gpt.py --config.model.grid=4,8 --workdir=run")
  models = "--gpt=run/bundle --tokenizer=vq --guidance-scale=1 --greedy"
  run("sample", f"{models} --classes=pair0,pair1 --out=pairs.npz")
  with np.load("pairs.npz") as file:
    np.testing.assert_array_equal(file["arr_0"], expected)
  settings = open_image_set("--samples", "pairs.npz").settings
  assert settings["image_size"] == settings["sampled_size"] == [8, 16]

  mask = np.zeros((8, 16), np.uint8)
  mask[:, 8:] = 255
  Image.fromarray(mask).save("mask.png")
  run(
    "edit",
    f"{models} --image=images/pair0/0.png --mask=mask.png --classes=pair0"
    " --candidates=1 --out=edited.png",
  )
  edited = np.asarray(Image.open("edited.png"))
  np.testing.assert_array_equal(edited[:, :7], images[0][:, :7])
  assert edited.shape == images[0].shape and edited[:, 8:].std() > 0
