"""Every config builds its recipe, in every variant it names."""

import dataclasses
import importlib

from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.training.gpt_step import GPTRecipe, schedule, work
from llamagen_jax.training.recipe import build
from llamagen_jax.training.tokenizer_step import TokenizerRecipe
from tests import tiny

TOKENIZERS = {
  "vq_digits": ["", "fast", "coloured", "gan", "rows=512,alive"],
  "vq_imagenet": [
    "",
    "VQ-8",
    "VQ-16,finetune",
    "VQ-16,runlocal",
    "VQ-16,recipe=vqgan-plus",
    "recipe=vqgan-plus,runlocal",
    "recipe=ibq",
    "recipe=ibq,runlocal",
  ],
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
  config = get_config(name, arg)
  recipe = build(TokenizerRecipe, config)
  assert recipe.data.image_size % recipe.model.downsample == 0
  if recipe.loss.adversarial_weight:
    assert recipe.loss.disc_start < recipe.run.steps  # or it would never act
  check_run(recipe)


@pytest.mark.parametrize("name, arg", cases(TRANSFORMERS))
def test_transformers(name, arg):
  recipe = build(GPTRecipe, get_config(name, arg))
  needs_guidance = recipe.objective.kind == "likelihood"
  assert (recipe.sampling.guidance_scale > 1) == needs_guidance
  if needs_guidance:  # which subtracts what a dropped condition gives
    assert recipe.model.condition_dropout > 0
  check_run(recipe)


def check_run(recipe):
  """A run warms up, looks at itself and saves before it ends."""
  run = recipe.run
  assert recipe.optimizer.warmup_steps < run.steps
  assert run.log_every <= run.steps
  assert run.steps <= 20 or run.save_every < run.steps


def test_small_variants_are_small():
  fast = build(GPTRecipe, get_config("c2i_digits", "fast"))
  full = build(GPTRecipe, get_config("c2i_digits", ""))
  assert fast.run.steps * 100 < full.run.steps
  assert fast.model == full.model
  local = build(GPTRecipe, get_config("c2i_imagenet", "runlocal"))
  assert (local.model.layers, local.model.dim, local.run.steps) == (4, 128, 20)


@pytest.fixture
def folder(tmp_path):
  """Images of three classes of 40 x 36 pixels, two of the classes held out, too."""
  for split, classes in (("train", "abc"), ("val", "ab")):
    for index, name in enumerate(classes * 4):
      path = tmp_path / split / name / f"{index}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (40, 36), (index * 9, 0, 0)).save(path)
  return tmp_path


@pytest.mark.parametrize("small", ["", ",small"])
def test_sizes_of_a_tokenizer_come_from_the_images(folder, small, caplog):
  caplog.set_level("INFO", "absl")
  config = get_config("vq_folder", f"{folder}/train,steps=50{small}")
  recipe = build(TokenizerRecipe, config)
  assert (recipe.data.image_size, recipe.model.downsample) == (32, 4)
  assert recipe.model.codebook_size == 64
  assert recipe.data.eval_source == f"folder:{folder}/val"
  assert "12 images of 3 classes" in caplog.text
  assert "images of 32x32, 8x8 codes of a codebook of 64, 50 steps" in caplog.text
  check_run(recipe)
  chosen = f"{folder}/train,image_size=16,codebook=32,eval={folder}/train"
  mine = build(TokenizerRecipe, get_config("vq_folder", chosen))
  assert (mine.data.image_size, mine.model.codebook_size) == (16, 32)
  assert "none are held out" in caplog.text


@pytest.mark.parametrize(
  "small, grid, shown", [("", 3, "3x3"), (",small", (2, 4), "2x4")]
)
def test_sizes_of_a_transformer_come_from_the_codes(
  tmp_path, small, grid, shown, caplog
):
  caplog.set_level("INFO", "absl")
  config = dataclasses.replace(tiny.GPT, grid=grid)
  codes = tiny.write_codes(tmp_path / "codes", config=config)
  recipe = build(GPTRecipe, get_config("c2i_folder", f"{codes},steps=50{small}"))
  model = recipe.model
  assert (model.grid, model.vocab_size, model.num_classes) == (grid, 50, 4)
  assert recipe.data.eval_codes == recipe.data.codes == str(codes)
  assert f"20 images of 4 classes, {shown} codes of a codebook of 50" in caplog.text
  assert "none are held out" in caplog.text
  check_run(recipe)


def test_codes_of_several_sizes(tmp_path):
  folders = []
  for name, grid in (("square", 3), ("wide", (2, 4))):
    config = dataclasses.replace(tiny.GPT, grid=grid)
    for split in ("train", "val"):
      folder = tmp_path / name / split
      folder.parent.mkdir(exist_ok=True)
      folders.append(str(tiny.write_codes(folder, config=config)))
  recipe = build(GPTRecipe, get_config("c2i_folder", f"{folders[0]},also={folders[2]}"))
  assert recipe.model.grids == (3, (2, 4))
  assert recipe.data.codes == f"{folders[0]},{folders[2]}"
  assert recipe.data.eval_codes == f"{folders[1]},{folders[3]}"
  check_run(recipe)


@pytest.mark.parametrize("name", ["vq_folder", "c2i_folder"])
def test_a_recipe_of_own_data_asks_for_it(name):
  with pytest.raises(UserError, match=rf"{name}\.py:FOLDER"):
    get_config(name, "")


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
