"""A model as the API sees it: prompts, pairs that do not fit, partial images."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("fastapi")

from llamagen_jax.errors import UserError  # noqa: E402
from llamagen_jax.parallel.mesh import unbox  # noqa: E402
from llamagen_jax.sampling.prompts import Prompts  # noqa: E402
from llamagen_jax.serving.api_error import APIError  # noqa: E402
from llamagen_jax.serving.image_model import GREY, ImageModel  # noqa: E402
from llamagen_jax.serving.schema import ImageRequest  # noqa: E402
from llamagen_jax.text.t5 import T5Config, init_t5  # noqa: E402
from llamagen_jax.weights import bundle  # noqa: E402
from llamagen_jax.weights.t5 import load_t5  # noqa: E402
from tests import tiny  # noqa: E402
from tests.serving import live  # noqa: E402

T5 = T5Config(60, 16, layers=1, heads=2, head_dim=8, ffn_dim=16)


@pytest.fixture(scope="module")
def of_classes():
  return live.tiny_model()


@pytest.fixture(scope="module")
def of_captions(of_classes, tmp_path_factory):
  folder = tmp_path_factory.mktemp("t5")
  t5 = jax.device_get(unbox(init_t5(T5, jax.random.key(0))))
  encoder = load_t5(tiny.write_t5(folder, T5, t5), dtype="float32")
  config = dataclasses.replace(
    of_classes.gpt.config, condition="caption", caption_tokens=10, caption_dim=16
  )
  gpt = dataclasses.replace(
    of_classes.gpt, config=config, text_encoder=encoder.identity
  )
  return ImageModel("text", gpt, of_classes.tokenizer, encoder)


def test_prompts_become_features(of_captions):
  prompt = "a red fox on a green hill"
  requests = of_captions.requests(ImageRequest(prompt=prompt, n=2), seed=0)
  prompts = Prompts.of(of_captions.gpt, of_captions.encoder, [prompt])
  features, mask = prompts.take(np.array([0]))
  for request in requests:
    np.testing.assert_array_equal(request.condition, features[0])
    np.testing.assert_array_equal(request.condition_mask, mask[0])
  assert of_captions.usage(requests).input_tokens == 20


def test_a_negative_prompt_is_of_captions(of_captions, of_classes):
  body = ImageRequest(prompt="a red fox", negative_prompt="blurry")
  [request] = of_captions.requests(body, seed=0)
  pair, masks = Prompts.of(
    of_captions.gpt, of_captions.encoder, ["a red fox"], negative="blurry"
  ).take(np.array([0]))
  np.testing.assert_array_equal([request.condition, request.negative], pair[0])
  np.testing.assert_array_equal(
    [request.condition_mask, request.negative_mask], masks[0]
  )
  assert of_captions.warnings(body) == []
  body = ImageRequest(prompt="1", negative_prompt="blurry")
  assert of_classes.requests(body, seed=0)[0].negative is None
  assert "'negative_prompt' is ignored" in of_classes.warnings(body)[0]


@pytest.mark.parametrize("seed", [0, 7, 2**31])
def test_keys_are_those_of_sample(of_classes, seed):
  requests = of_classes.requests(ImageRequest(class_labels=[1, 2], n=2), seed)
  assert [r.condition for r in requests] == [1, 1, 2, 2]
  for i, request in enumerate(requests):
    expected = jax.random.fold_in(jax.random.key(seed), i)
    np.testing.assert_array_equal(request.key, jax.random.key_data(expected))


@pytest.mark.parametrize("given, expected", [
  ({"temperature": 0}, {"greedy": True}),
  ({"temperature": 0.5}, {"temperature": 0.5}),
  ({"guidance_scale": 0}, {"guidance_scale": 1.0}),
  ({"guidance_scale": 3}, {"guidance_scale": 3.0}),
])  # fmt: skip
def test_zeros_of_other_servers(of_classes, given, expected):
  [request] = of_classes.requests(ImageRequest(prompt="1", **given), seed=0)
  assert request.sampling == dataclasses.replace(of_classes.gpt.sampling, **expected)


def test_a_temperature_ends_greedy_defaults(of_classes):
  gpt = of_classes.gpt
  greedy = dataclasses.replace(gpt.sampling, greedy=True)
  model = ImageModel(
    "x", dataclasses.replace(gpt, sampling=greedy), of_classes.tokenizer
  )
  for given, expected in (({}, True), ({"temperature": 0.9}, False)):
    [request] = model.requests(ImageRequest(prompt="1", **given), seed=0)
    assert request.sampling.greedy is expected


@pytest.mark.parametrize("body, param", [
  ({"prompt": " "}, "prompt"), ({}, "prompt"), ({"class_label": 1}, "class_label"),
  ({"prompt": "a cat", "class_labels": [1]}, "class_labels"),
])  # fmt: skip
def test_a_model_of_captions_wants_a_prompt(of_captions, body, param):
  with pytest.raises(APIError) as error:
    of_captions.requests(ImageRequest(**body), seed=0)
  assert (error.value.status, error.value.param) == (400, param)


def test_a_class_that_is_no_number_is_refused(of_classes):
  with pytest.raises(APIError, match="Invalid 'prompt'"):
    of_classes.requests(ImageRequest(prompt="class:--1"), seed=0)


def test_refuses_models_that_do_not_fit(of_classes, of_captions):
  sampling = dataclasses.replace(of_classes.gpt.sampling, guidance_beta=0.5)
  strange = dataclasses.replace(of_classes.gpt, sampling=sampling)
  with pytest.raises(UserError, match="guidance_beta=0.5: the model was not trained"):
    ImageModel("x", strange, of_classes.tokenizer)
  with pytest.raises(UserError, match="--t5"):
    ImageModel("x", of_captions.gpt, of_classes.tokenizer)
  stranger = dataclasses.replace(of_captions.gpt, text_encoder="another")
  with pytest.raises(UserError, match="text encoder"):
    ImageModel("x", stranger, of_classes.tokenizer, of_captions.encoder)
  tokenizer = bundle.Tokenizer(tiny.TOKENIZER, None, "another")
  with pytest.raises(UserError, match="tokenizer"):
    ImageModel("x", of_classes.gpt, tokenizer)


@pytest.mark.parametrize("count", [1, 6, 15])
@pytest.mark.parametrize("rows", [4, 2])
def test_a_partial_image_is_grey_where_no_code_is(of_classes, count, rows):
  grid = (rows, 16 // rows)
  gpt = dataclasses.replace(
    of_classes.gpt, config=dataclasses.replace(of_classes.gpt.config, grid=grid)
  )
  model = ImageModel("x", gpt, of_classes.tokenizer)
  codes = np.random.default_rng(0).integers(0, 16, 16, np.int32)
  image = model.render_partly(codes[:count])
  assert model.size == (image.shape[1], image.shape[0]) == (32 // rows, 2 * rows)
  blocks = image.reshape(rows, 2, 16 // rows, 2, 3).swapaxes(1, 2).reshape(16, -1)
  assert (blocks[count:] == GREY).all() and (blocks[:count] != GREY).any(axis=1).all()


def test_a_bundle_that_samples_in_another_order_is_refused(of_classes):
  sampling = dataclasses.replace(of_classes.gpt.sampling, order="random")
  gpt = dataclasses.replace(of_classes.gpt, sampling=sampling)
  with pytest.raises(UserError, match="tiny: .*order=random; serve draws .* raster"):
    ImageModel("tiny", gpt, of_classes.tokenizer)
