"""Bundles, as programs call them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llamagen_jax as lg
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.images import from_uint8
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights.bundle import Tokenizer, Transformer
from tests import tiny


def test_bytes_and_floats_of_a_image_have_the_same_codes():
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  tokenizer = Tokenizer(tiny.TOKENIZER, params, "tiny")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
  codes = tokenizer.encode(images)
  assert len(np.unique(codes)) > 1
  np.testing.assert_array_equal(codes, tokenizer.encode(from_uint8(images)))


def test_a_transformer_computes_in_another_type_when_asked_to(tmp_path):
  params = unbox(init_gpt(tiny.GPT, jax.random.key(0)))
  lg.save_gpt(tmp_path, Transformer(tiny.GPT, params, lg.SamplingConfig(), "tiny"))
  for dtype in ("float32", "bfloat16"):
    gpt = lg.load_gpt(tmp_path, lg.make_mesh(), dtype=dtype)
    assert gpt.config.dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, gpt.params, params)
  assert lg.load_gpt(tmp_path).config == tiny.GPT


def test_a_square_is_written_as_one_number_and_other_grids_come_back(tmp_path):
  params = unbox(init_gpt(tiny.GPT, jax.random.key(0)))
  for grid, written in ((3, 3), ((1, 9), [1, 9])):
    config = dataclasses.replace(tiny.GPT, grid=grid)
    gpt = Transformer(config, params, lg.SamplingConfig(), "tiny")
    lg.save_gpt(tmp_path, gpt)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["config"]["grid"] == written
    assert lg.load_gpt(tmp_path).config == config


@pytest.mark.parametrize("field, message", [
  ({"guidance_wave": 1}, r"config.json: sampling: written by .*\['guidance_wave'\]"),
  ({"guidance_schedule": "sawtooth"}, r"config.json: sampling: guidance_schedule=saw"),
])  # fmt: skip
def test_settings_that_are_not_known_name_the_file(tmp_path, field, message):
  params = unbox(init_gpt(tiny.GPT, jax.random.key(0)))
  lg.save_gpt(tmp_path, Transformer(tiny.GPT, params, lg.SamplingConfig(), "tiny"))
  path = tmp_path / "config.json"
  fields = json.loads(path.read_text())
  fields["sampling"] |= field
  path.write_text(json.dumps(fields))
  with pytest.raises(lg.UserError, match=message):
    lg.load_gpt(tmp_path)
