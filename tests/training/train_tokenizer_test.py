"""Runs of a tokenizer: their phases, and weights that they start from."""

import dataclasses
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.training import train_tokenizer
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.training.tokenizer_state import InitConfig, load_weights
from llamagen_jax.weights import bundle
from tests import tiny
from tests.training.tiny_tokenizer import fresh, make_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The state and the work folder of a run through all stages."""
  folder = tmp_path_factory.mktemp("tokenizer")
  images = tiny.write_images(folder / "images")
  return train_tokenizer.train(
    tiny.tokenizer_config(images, 3, disc_start=2), folder / "run"
  ), folder / "run"


def test_the_discriminator_waits_then_leads_then_acts(run):
  folder = run[1]
  rows = [r for r in read_rows(folder / "metrics.jsonl") if "loss" in r]
  assert ["discriminator_loss" in row for row in rows] == [False, True, True]
  assert ["adversarial" in row for row in rows] == [False, False, True]
  evaluated = read_rows(folder / "metrics.jsonl")[-1]
  assert {"eval/psnr", "eval/ssim", "eval/ssim_lg", "eval/usage"} <= evaluated.keys()


@pytest.mark.parametrize("optimizers", [True, False])
def test_a_run_starts_from_another_ones_weights(run, optimizers):
  trained, folder = run
  recipe = make_recipe()
  config = InitConfig(str(folder), optimizers=optimizers)
  state = load_weights(config, fresh(recipe, seed=9))
  assert int(state.step) == 0
  for name in ("generator", "discriminator"):
    found, expected = getattr(state, name), getattr(trained, name)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    nu = (found.opt_state.inner[1].nu, expected.opt_state.inner[1].nu)
    if optimizers:
      jax.tree.map(np.testing.assert_array_equal, *nu)
      counts = [int(s.opt_state.inner[1].count) for s in (found, expected)]
      assert counts[0] == counts[1]
    else:
      assert not any(leaf.any() for leaf in jax.tree.leaves(nu[0]))
    assert int(found.opt_state.inner[3].count) == 0  # of the learning rate
    assert int(found.opt_state.taken) == 0  # of the guard

  without = InitConfig(str(folder), discriminator=False)
  other = fresh(recipe, seed=9)
  kept = load_weights(without, other).discriminator.params
  jax.tree.map(np.testing.assert_array_equal, kept, other.discriminator.params)

  from_bundle = InitConfig(str(folder / "bundle"))
  found = load_weights(from_bundle, fresh(recipe, seed=9))
  expected = bundle.load_tokenizer(folder / "bundle").params
  jax.tree.map(np.testing.assert_array_equal, found.params, expected)


@pytest.mark.slow
def test_a_guard_may_be_switched_on_in_a_resumed_run(run, tmp_path):
  folder = shutil.copytree(run[1], tmp_path / "run")
  config = json.loads((folder / "config.json").read_text())
  config["guard"] = {"skip_nonfinite": True}
  config["run"]["steps"] += 1
  state = train_tokenizer.train(ml_collections.ConfigDict(config), folder)
  assert int(state.step) == config["run"]["steps"]
  assert int(state.generator.opt_state.skipped) == 0


def test_weights_of_another_shape_are_refused(tmp_path):
  recipe = make_recipe()
  bundle.save_tokenizer(tmp_path, recipe.model, fresh(recipe).params)
  model = dataclasses.replace(recipe.model, codebook_size=32)
  other = fresh(dataclasses.replace(recipe, model=model))
  with pytest.raises(UserError, match=r"codebook is \(16, 4\).*expects \(32, 4\)"):
    load_weights(InitConfig(str(tmp_path)), other)
  with pytest.raises(UserError, match="--init-from=.*none: expected a workdir"):
    load_weights(InitConfig(str(tmp_path / "none")), other)
