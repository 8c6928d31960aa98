"""Every config builds its recipe, in every variant it names."""

import importlib

import pytest

from llamagen_jax import UserError
from llamagen_jax.training.gpt_step import GPTRecipe, schedule, work
from llamagen_jax.training.recipe import build
from llamagen_jax.training.tokenizer_step import TokenizerRecipe

TOKENIZERS = {
  "vq_digits": ["", "fast", "coloured", "gan", "rows=512,alive"],
  "vq_imagenet": ["", "VQ-8", "VQ-16,finetune", "VQ-16,runlocal"],
}
TRANSFORMERS = {
  "c2i_digits": ["", "fast"],
  "c2i_imagenet": [
    "",
    "L,image_size=384",
    "3B,image_size=384,epochs=50",
    "L,strong",
    "L,recipe=npp",
    "L,recipe=wsd",
    "L,recipe=rar",
    "L,recipe=gft",
    "runlocal",
  ],
  "finetune": ["", "L,lora", "L,only=table", "L,align", "runlocal"],
  "t2i_digits": ["", "fast"],
  "t2i_laion": ["", "stage2", "stage1,runlocal"],
}


def cases(table):
  return [(name, arg) for name, args in table.items() for arg in args]


def get_config(name, arg):
  return importlib.import_module(f"llamagen_jax.configs.{name}").get_config(arg)


@pytest.mark.parametrize("name, arg", cases(TOKENIZERS))
def test_tokenizers(name, arg):
  recipe = build(TokenizerRecipe, get_config(name, arg))
  assert recipe.data.image_size % recipe.model.downsample == 0


@pytest.mark.parametrize("name, arg", cases(TRANSFORMERS))
def test_transformers(name, arg):
  recipe = build(GPTRecipe, get_config(name, arg))
  needs_guidance = recipe.objective.kind == "likelihood"
  assert (recipe.sampling.guidance_scale > 1) == needs_guidance
  assert recipe.run.steps > 0


def test_recipes_of_better_models():
  steps = 300 * 1_281_167 // 256
  npp = build(GPTRecipe, get_config("c2i_imagenet", "L,recipe=npp"))
  assert npp.objective.patch_phases == ((2, steps // 2),)
  rates = [float(schedule(npp)(s)) for s in (0, 5_004, steps // 2 - 1, steps // 2)]
  assert rates == pytest.approx([0, 1e-4, 1e-5, 0], rel=1e-2, abs=1e-9)
  share = work(npp, 2).flops / work(npp, 1).flops
  assert 0.2 < share < 0.26  # a quarter of the tokens
  with pytest.raises(UserError, match="recipe=best': expected npp, wsd, rar or gft"):
    get_config("c2i_imagenet", "L,recipe=best")


def test_published_sizes_and_lengths():
  recipe = build(GPTRecipe, get_config("c2i_imagenet", "L,image_size=384,epochs=50"))
  assert (recipe.model.layers, recipe.model.grid) == (24, 24)
  assert recipe.run.steps == 50 * 1_281_167 // 256
  assert recipe.sampling.guidance_scale == 2.0


def test_an_unknown_preset_is_named():
  with pytest.raises(UserError, match="unknown GPT preset 'Q'"):
    get_config("c2i_imagenet", "Q")
