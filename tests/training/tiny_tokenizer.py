"""A tiny tokenizer's recipe and its fresh state."""

import dataclasses

import jax

from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training.recipe import build
from llamagen_jax.training.tokenizer_step import TokenizerRecipe, init_state
from tests import tiny


def make_recipe(**changes) -> TokenizerRecipe:
  recipe = build(TokenizerRecipe, tiny.tokenizer_config("nowhere", 10))
  model = dataclasses.replace(recipe.model, dropout=0.0)
  return dataclasses.replace(recipe, model=model, **changes)


def fresh(recipe, seed=0):
  return unbox(init_state(recipe, jax.random.key(seed)))
