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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def expected_of_tokenizer(images, tmp_path_factory):
  config = tiny.tokenizer_config(images, 5, batch_size=8)
  return losses_on_one_device(tokenizer_train, config, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_tokenizer(images, expected_of_tokenizer, tmp_path, mesh):
  config = tiny.tokenizer_config(images, 5, batch_size=8)
  found = losses(tokenizer_train, config, tmp_path, MESHES[mesh])
  np.testing.assert_allclose(found, expected_of_tokenizer, atol=1e-4)
