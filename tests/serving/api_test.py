"""The HTTP API, by OpenAI's own client, on a real socket."""

import base64
import dataclasses
import io
import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llamagen_jax.errors import UserError  # noqa: E402
from llamagen_jax.serving.service import Service  # noqa: E402
from llamagen_jax.serving.store import FolderStore  # noqa: E402
from tests.serving import live  # noqa: E402
from tests.serving.fake import codes_of  # noqa: E402

JSON = {"Content-Type": "application/json"}
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(image_model, tmp_path_factory):
  store = FolderStore(tmp_path_factory.mktemp("store"), days=0)
  with live.serve(image_model, app={"store": store}) as server:
    yield server


@pytest.fixture(scope="module")
def strict(image_model):
  limits = dataclasses.replace(
    live.LIMITS, strict=True, aliases=(), size_policy="exact"
  )
  with live.serve(image_model, limits=limits) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def opened(b64: str) -> Image.Image:
  return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_generates(client, server, image_model):
  response = client.images.generate(
    prompt="class:2", n=2, size="8x8", user="me", extra_body={"seed": 5, "top_k": 3}
  )
  assert response.usage.output_tokens == 2 * 16 and response.usage.total_tokens == 34
  assert response.usage.model_extra["forwards"] == 2 * 16  # as the fake engine says
  metrics = live.HTTP.get(f"{server.url}/metrics").text
  images, forwards = (
    float(re.search(rf"llamagen_{name}_total{{.*}} (.*)", metrics)[1])
    for name in ("images", "forwards")
  )
  assert forwards == 16 * images
  assert response.model_extra["seed"] == 5 and response.output_format == "png"
  requests = server.engine.requests[-2:]
  assert [r.condition for r in requests] == [2, 2]
  assert [r.sampling.top_k for r in requests] == [3, 3]
  for i, (image, request) in enumerate(zip(response.data, requests, strict=True)):
    key = jax.random.fold_in(jax.random.key(5), i)  # that of `llamagen sample`
    assert (request.key == jax.random.key_data(key)).all()
    expected = image_model.render(codes_of(request, 16)[None])[0]
    np.testing.assert_array_equal(np.asarray(opened(image.b64_json)), expected)


def test_prompts_and_classes_of_a_class_model(client, server):
  def labels(prompt="", **extra):
    n = extra.pop("n", 1)
    done = len(server.engine.requests)
    client.images.generate(prompt=prompt, n=n, extra_body=extra)
    return [r.condition for r in server.engine.requests[done:]]

  assert labels("3") == labels("class:3") == labels("tiger shark") == [3]
  assert labels("n01440764") == labels("class: tench") == [0]
  assert labels("anything", class_label=1) == labels(class_label="goldfish") == [1]
  assert labels(class_labels=[2, "tench"], n=2) == [2, 2, 0, 0]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client, kind):
  [image] = client.images.generate(
    prompt="1", output_format=kind, output_compression=80, extra_body={"seed": 1}
  ).data
  image = opened(image.b64_json)
  assert image.format == kind.upper() and image.size == (8, 8)


def test_a_stored_image_has_a_url(client, server):
  [image] = client.images.generate(
    prompt="1", response_format="url", output_format="webp"
  ).data
  assert image.url.startswith(server.url) and image.b64_json is None
  image = live.HTTP.get(image.url)
  assert image.headers["content-type"] == "image/webp"
  assert Image.open(io.BytesIO(image.content)).size == (8, 8)


def test_streams(client, image_model):
  extra = {"seed": 3}
  events = list(
    client.images.generate(
      prompt="0", n=2, stream=True, partial_images=3, extra_body=extra
    )
  )
  whole = client.images.generate(prompt="0", n=2, extra_body=extra).data
  for i, image in enumerate(whole):
    mine = [e for e in events if e.model_extra["image_index"] == i]
    *partial, last = mine
    assert [e.type for e in partial] == ["image_generation.partial_image"] * 3
    assert [e.partial_image_index for e in partial] == [0, 1, 2]
    assert last.type == "image_generation.completed"
    assert last.b64_json == image.b64_json and last.usage.output_tokens == 16
    for quarter, event in enumerate(partial, start=1):
      image = np.asarray(opened(event.b64_json))
      assert (image[2 * quarter :] == 128).all()  # grey below the last code
      assert (image[: 2 * quarter] != 128).any()


def test_lists_models(client):
  [model] = client.models.list().data
  assert model.id == "tiny" and model.model_extra["size"] == "8x8"
  assert model.model_extra["classes"] == 4
  assert client.models.retrieve("tiny").owned_by == "llamagen"
  assert client.models.retrieve("dall-e-3").id == "tiny"  # an alias
  with pytest.raises(openai.NotFoundError, match="does not exist"):
    client.models.retrieve("gpt/image")


# What the message has to name, beside the status and the field.
REFUSED = [
  (400, "prompt", {"prompt": "a cat in a hat"}, "0 .. 3 or its name, such as 3 or 'ti"),
  (400, "prompt", {"prompt": ""}, "no class is given. Expected a class, 0 .. 3"),
  (400, "prompt", {}),
  (400, "prompt", {"prompt": 7}),
  (400, "prompt", {"prompt": "0-999999999999"}),
  (400, "prompt", {"prompt": "1,2"}),
  (400, "prompt", {"prompt": "\ud800"}),
  (400, "prompt", {"prompt": "9" * 5000}),
  (400, "prompt", {"prompt": "4"}, "no class 4. Expected a class, 0 .. 3"),
  (400, "prompt", {"prompt": "-1"}, "no class -1"),
  (404, "model", {"prompt": "1", "model": "dall-e-3"}, "this server has 'tiny'"),
  (404, "model", {"prompt": "1", "model": ""}),
  (400, "n", {"prompt": "1", "n": 0}),
  (400, "n", {"prompt": "1", "n": 10**30}),
  (400, "n", {"prompt": "1", "n": "2"}),
  (400, "n", {"prompt": "1", "n": True}),
  (400, "n", {"class_labels": [0, 1, 2], "n": 2}, "6 images: expected 1 .. 4"),
  (400, "size", {"prompt": "1", "size": "1024x1024"}, "expected '8x8' or 'auto'"),
  (400, "size", {"prompt": "1", "size": "large"}, "WIDTHxHEIGHT, such as '8x8'"),
  (400, "output_format", {"prompt": "1", "output_format": "gif"}),
  (400, "output_compression", {"prompt": "1", "output_compression": 101}),
  (400, "background", {"prompt": "1", "background": "transparent"}),
  (400, "partial_images", {"prompt": "1", "stream": True, "partial_images": 4}),
  (400, "partial_images", {"prompt": "1", "partial_images": 1}),
  (400, "temperature", {"prompt": "1", "temperature": -1}, "or equal to 0"),
  (400, "guidance_scale", {"prompt": "1", "guidance_scale": -2}, "or equal to 0"),
  (400, "guidance_schedule", {"prompt": "1", "guidance_schedule": "zigzag"}),
  (400, "top_p", {"prompt": "1", "top_p": 1.5}),
  (400, "seed", {"prompt": "1", "seed": -2}),
  (400, "seed", {"prompt": "1", "seed": 2**64}),
  (400, "class_label", {"class_label": "unicorn"}),
  (400, "class_labels", {"class_labels": [0, 99]}),
  (400, "frame_count", {"prompt": "1", "frame_count": 2}),
  (400, None, {"\ud800": 1}),
  (400, None, []),
]


def check_error(response, status: int, param=None):
  assert response.status_code == status, response.text
  error = response.json()["error"]
  assert error.keys() == {"message", "type", "param", "code"}
  assert error["message"] and error["type"]
  assert error["param"] == param
  return error


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_refuses(strict, refused):
  status, param, body, *words = refused
  text = json.dumps(body)  # escapes the half of a surrogate pair
  response = live.HTTP.post(strict.url + PATH, content=text, headers=JSON)
  message = check_error(response, status, param)["message"]
  assert all(word in message for word in words), message


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"nonsense", b"\xff\xfe", b"[" * 50_000, b'{"n": 1' + b"0" * 9000],
)
def test_refuses_what_is_no_json(server, content):
  check_error(live.HTTP.post(server.url + PATH, content=content, headers=JSON), 400)


def test_refuses_large_bodies(server):
  big = {"prompt": "x" * 5_000_000}
  check_error(live.HTTP.post(server.url + PATH, json=big), 413)
  chunks = (b"x" * 10_000 for _ in range(30))  # of no announced length
  check_error(live.HTTP.post(server.url + PATH, content=chunks, headers=JSON), 413)


def test_refuses_other_paths_and_methods(server):
  check_error(live.HTTP.get(server.url + "/v1/edits"), 404)
  assert (
    check_error(live.HTTP.get(server.url + PATH), 405)["code"] == "method_not_allowed"
  )


def test_asks_for_the_key(image_model):
  with live.serve(image_model, key=live.KEY) as server:
    for header in ({}, {"Authorization": "Bearer"}, {"Authorization": "Basic x"}):
      response = live.HTTP.post(server.url + PATH, content=b"{", headers=header)
      assert check_error(response, 401)["code"] == "missing_api_key"
    wrong = {"Authorization": "Bearer sk-tesx"}
    error = check_error(live.HTTP.get(server.url + "/v1/models", headers=wrong), 401)
    assert error["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/metrics"):
      assert live.HTTP.get(server.url + path).status_code == 200
    for header in ("api-key", "x-api-key"):
      response = live.HTTP.get(server.url + "/v1/models", headers={header: live.KEY})
      assert response.status_code == 200
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=live.KEY)
    assert client.images.generate(prompt="1").data


def test_several_models():
  models = live.tiny_model("first"), live.tiny_model("second")
  with live.serve(*models) as server:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    assert [model.id for model in client.models.list()] == ["first", "second"]
    for asked, answers in [
      ("second", "second"), ("first", "first"), (None, "first"), ("dall-e-2", "first"),
    ]:  # fmt: skip
      body = {"prompt": "1", "model": asked}
      response = live.HTTP.post(server.url + PATH, json=body)
      assert response.json()["model"] == answers
    check_error(
      live.HTTP.post(server.url + PATH, json={"prompt": "1", "model": "third"}),
      404, "model",
    )  # fmt: skip
    text = live.HTTP.get(server.url + "/metrics").text
    assert 'llamagen_images_total{model="first"} 3.0' in text
    assert 'llamagen_images_total{model="second"} 1.0' in text
    with pytest.raises(UserError, match="names that differ"):
      Service(
        dict.fromkeys([models[0], live.tiny_model("first")], server.worker), live.LIMITS
      )
