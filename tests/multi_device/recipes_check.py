"""As training_check, with recipes beyond the published one, and of the tokenizer."""

import numpy as np
import pytest

from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training import train_tokenizer as tokenizer_train
from tests import tiny
from tests.multi_device.training_check import (
  MESHES,
  losses,
  losses_on_one_device,
)

# Several in one run where they do not exclude each other: a run is mostly compilation.
RECIPES = {
  "npp-muon": {
    "objective": {"patch_phases": ((3, 2),)}, "optimizer": {"kind": "muon"},
  },
  "rar-lora": {
    "objective": {"random_order": (2, 4)}, "model": {"target_embedding": True},
    "train": {"only": "table", "lora": {"rank": 2}},
  },
  "gft-noise": {
    "objective": {"kind": "guidance-free", "code_noise": 0.5},
    "model": {"guidance_embedding": True},
  },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_beyond_the_published_one(codes, tmp_path, name):
  def config():
    config = tiny.gpt_config(codes, 5)
    for section, fields in RECIPES[name].items():
      config[section] = {**config.get(section, {}), **fields}
    return config

  found = losses(gpt_train, config(), tmp_path / "run", MESHES["mixed"])
  expected = losses_on_one_device(gpt_train, config(), tmp_path / "one")
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokenizer(tmp_path):
  images = tiny.write_images(tmp_path / "images")

  def config():
    return tiny.tokenizer_config(images, 5, batch_size=8, disc_start=2)

  mesh = {"data": 2, "fsdp": 4, "tensor": 1}
  found = losses(tokenizer_train, config(), tmp_path / "run", mesh)
  expected = losses_on_one_device(tokenizer_train, config(), tmp_path / "one")
  np.testing.assert_allclose(found, expected, atol=1e-4)
