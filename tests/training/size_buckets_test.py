"""A transformer of two grids: trained, killed, resumed, and sampled at both."""

import dataclasses

import jax
import numpy as np
import pytest

from llamagen_jax import sample
from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import train_gpt
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build
from llamagen_jax.weights import bundle
from tests import tiny

MODEL = dataclasses.replace(tiny.GPT, vocab_size=16, grid=3, other_grids=((2, 4),))
STEPS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("codes")
  square = tiny.write_codes(folder / "square", config=MODEL.at(3))
  wide = tiny.write_codes(folder / "wide", records=12, config=MODEL.at((2, 4)))
  return square, wide


def make_config(folders, steps: int = STEPS):
  config = tiny.gpt_config(",".join(map(str, folders)), steps)
  config.model = dataclasses.asdict(MODEL)
  return config


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  return train_gpt.train(make_config(folders), folder), folder


def test_steps_are_of_both_grids(folders):
  task = train_gpt.make_task(build(GPTRecipe, make_config(folders)))
  work = {task.phase_at(step).work for step in range(STEPS)}
  assert sorted(w.tokens for w in work) == [8 * MODEL.at((2, 4)).length, 8 * 9]


def test_a_resumed_run_is_the_uninterrupted_one(folders, trained, tmp_path):
  train_gpt.train(make_config(folders, steps=5), tmp_path)
  resumed = train_gpt.train(make_config(folders), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, trained[0].params, resumed.params)


def test_evaluation_is_over_both(folders):
  recipe = build(GPTRecipe, make_config(folders))
  evaluation = train_gpt.make_task(recipe).evaluate
  assert [len(source) for source in evaluation.sources.values()] == [20, 12]


@pytest.mark.slow
def test_samples_of_either_size(trained):
  gpt = bundle.load_gpt(trained[1] / "bundle")
  assert gpt.config.grids == (3, (2, 4))
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  tokenizer = bundle.Tokenizer(tiny.TOKENIZER, params, gpt.tokenizer)
  shapes = [
    sample(gpt, tokenizer, [0, 1], image_size=size).shape
    for size in (None, 6, (4, 8), (8, 16))
  ]
  sides = [(6, 6), (6, 6), (4, 8), (8, 16)]
  assert shapes == [(2, *size, 3) for size in sides]
  alone = dataclasses.replace(gpt, config=gpt.config.at((2, 4)))
  np.testing.assert_array_equal(
    sample(gpt, tokenizer, [1], image_size=(4, 8)), sample(alone, tokenizer, [1])
  )
  with pytest.raises(UserError, match="image size 4x8: .* 6x6 or 8x4"):
    sample(gpt, tokenizer, [0], image_size=(8, 4))


def test_folders_that_do_not_fit(folders):
  square, wide = folders
  for data, problem in (
    ((square,), "data.codes=.*: grids 3; expected a folder for each of the model's"),
    ((wide, wide), "expected a folder for each of the model's, 3, "),
  ):
    with pytest.raises(UserError, match=problem):
      train_gpt.make_task(build(GPTRecipe, make_config(data)))
  config = make_config(folders)
  config.model.other_grids = ((4, 2),)
  with pytest.raises(UserError, match=r"2x4 codes .* expects 3x3 or 4x2"):
    train_gpt.make_task(build(GPTRecipe, config))


def test_a_model_of_target_positions_has_one_grid():
  with pytest.raises(UserError, match="target_embedding has one grid"):
    dataclasses.replace(MODEL, target_embedding=True)
