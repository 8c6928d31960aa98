"""Requests as other servers' clients send them: names, sizes, fields, URLs."""

import base64
import dataclasses
import io
import os
import time

from PIL import Image
import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llamagen_jax.serving.request_body import RENAMED  # noqa: E402
from llamagen_jax.serving.schema import ImageRequest  # noqa: E402
from llamagen_jax.serving.store import DataURLs, FolderStore, MemoryStore  # noqa: E402
from tests.serving import live  # noqa: E402

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(image_model):
  with live.serve(image_model) as server:
    yield server


def post(server, **body):
  return live.HTTP.post(server.url + PATH, json={"prompt": "1"} | body)


def changed(image_model, **limits):
  return live.serve(image_model, limits=dataclasses.replace(live.LIMITS, **limits))


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3", "gpt-image-1", "", None])
def test_names_of_openai_and_none_at_all(server, name):
  response = post(server, model=name)
  assert response.status_code == 200 and response.json()["model"] == "tiny"


def test_an_alias_and_any_name(image_model):
  with changed(image_model, aliases=("flux",)) as server:
    assert post(server, model="flux").json()["model"] == "tiny"
    assert post(server, model="dall-e-3").status_code == 404
  with changed(image_model, any_model=True) as server:
    assert post(server, model="whatever").json()["model"] == "tiny"


def opened(response) -> Image.Image:
  [data] = response.json()["data"]
  return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


@pytest.mark.parametrize("size", ["512x512", "1024x1024", "1792x1024"])
def test_sizes(image_model, server, size):
  response = post(server, size=size)
  assert response.json()["size"] == "8x8" and opened(response).size == (8, 8)
  warning = f"'size' {size}: this model generates 8x8."
  assert response.json()["warnings"] == [warning]
  with changed(image_model, size_policy="resize") as resizing:
    response = post(resizing, size=size)
    assert response.json()["size"] == size
    assert "resized from 8x8" in response.json()["warnings"][0]
    assert opened(response).size == tuple(map(int, size.split("x")))
    assert post(resizing, size="9000x9000").status_code == 400
  with changed(image_model, size_policy="exact") as exact:
    assert post(exact, size=size).status_code == 400


@pytest.mark.parametrize("policy, asked, size", [
  ("exact", "16x4", "16x4"), ("nearest", "2048x512", "16x4"),
  ("nearest", "1792x1024", "8x8"), ("resize", "32x8", "32x8"), ("exact", "auto", "8x8"),
])  # fmt: skip
def test_a_model_of_several_sizes(policy, asked, size):
  models = live.tiny_model("both"), live.tiny_model("both", grid=(2, 8))
  limits = dataclasses.replace(live.LIMITS, size_policy=policy)
  with live.serve(*models, limits=limits) as server:
    response = post(server, size=asked)
    assert response.json()["size"] == size and response.json()["model"] == "both"
    assert opened(response).size == tuple(map(int, size.split("x")))
    error = post(server, size="4x16x1").json()["error"]
    assert error["code"] == "invalid_value"


@pytest.mark.parametrize("size", ["8x8", "auto", None])
def test_sizes_without_a_warning(server, size):
  assert "warnings" not in post(server, size=size).json()


def test_both_forms_unless_one_is_asked_for(server):
  [both] = post(server).json()["data"]
  file = live.HTTP.get(both["url"])
  assert file.headers["content-type"] == "image/png"
  assert file.content == base64.b64decode(both["b64_json"])
  assert post(server, response_format="url").json()["data"][0].keys() == {"url"}
  [b64] = post(server, response_format="b64_json").json()["data"]
  assert b64.keys() == {"b64_json"}
  assert live.HTTP.get(both["url"][:-9] + "12345.png").status_code == 404
  assert live.HTTP.get(f"{server.url}/images/..%2fsecret.png").status_code == 404


def test_replicas_answer_with_data_urls(image_model):
  with live.serve(image_model, app={"store": DataURLs()}) as server:
    [data] = post(server, response_format="url", output_format="webp").json()["data"]
    kind, _, b64 = data["url"].partition(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(b64))).size == (8, 8)


def test_stored_files_are_deleted_after_days(image_model, tmp_path):
  old, mine = tmp_path / ("a" * 32 + ".png"), tmp_path / "holiday.png"
  for path in (old, mine):
    path.write_bytes(b"x")
    os.utime(path, (0, time.time() - 3 * 24 * 3600))
  store = FolderStore(tmp_path, days=2)
  with live.serve(image_model, app={"store": store}) as server:
    live.wait_until(lambda: not old.exists())
    assert mine.exists()  # the server never made it
    [data] = post(server, response_format="url").json()["data"]
    assert live.HTTP.get(data["url"]).status_code == 200
    assert len(list(tmp_path.iterdir())) == 2


def test_memory_keeps_the_newest_images():
  store = MemoryStore(largest=250)
  urls = [store.save(bytes(100), "png", "http://x/") for _ in range(3)]
  names = [url.rpartition("/")[2] for url in urls]
  assert [store.get(name) is not None for name in names] == [False, True, True]
  store = MemoryStore(seconds=-1.0)
  assert store.get(store.save(b"x", "png", "").rpartition("/")[2]) is None


def test_fields_of_other_servers(server):
  response = post(
    server, num_images=2, cfg_scale=3.5, random_seed=9, format="jpg", width=512,
    height=512, steps=30, sampler="euler", negative_prompt="blurry", loras=[],
    scheduler=None,
  ).json()  # fmt: skip
  assert len(response["data"]) == 2 and response["output_format"] == "jpeg"
  assert response["seed"] == 9
  assert server.engine.requests[-1].sampling.guidance_scale == 3.5
  warnings = " ".join(response["warnings"])
  for field in ("steps", "sampler", "negative_prompt", "loras", "512x512"):
    assert field in warnings
  assert "scheduler" not in warnings and "cfg_scale" not in warnings
  assert set(RENAMED.values()) <= ImageRequest.model_fields.keys()


def test_a_field_of_another_server_with_a_wrong_value(server):
  response = post(server, cfg_scale="high")
  assert response.status_code == 400
  assert response.json()["error"]["param"] == "cfg_scale"


def test_ours_goes_before_theirs(server):
  response = post(server, n=1, num_images=3).json()
  assert len(response["data"]) == 1
  assert response["warnings"] == ["'num_images' is ignored."]


def test_warnings_come_with_a_stream(server):
  text = post(server, stream=True, steps=30).text
  assert "'steps' is ignored." in text


def test_strict_refuses_them_all(image_model):
  with changed(image_model, strict=True) as server:
    for field in ("steps", "num_images", "width"):
      response = post(server, **{field: 1})
      assert response.status_code == 400
      assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**53])
def test_seeds_of_more_than_31_bits(server, seed):
  first, again = post(server, seed=seed).json(), post(server, seed=seed).json()
  assert first["seed"] == seed
  assert first["data"][0]["b64_json"] == again["data"][0]["b64_json"]
  lower = post(server, seed=seed % 2**31).json()
  assert lower["data"][0]["b64_json"] != first["data"][0]["b64_json"]


def test_a_random_seed(server):
  first, second = post(server, seed=-1).json(), post(server, seed=-1).json()
  assert first["seed"] != second["seed"] and min(first["seed"], second["seed"]) >= 0


def test_zero_means_off(server):
  assert post(server, temperature=0, guidance_scale=0).status_code == 200
  sampling = server.engine.requests[-1].sampling
  assert sampling.greedy and sampling.guidance_scale == 1.0
