"""Edits and variations over HTTP, by OpenAI's own client and by hand."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")

from tests.serving import live  # noqa: E402

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
SIDE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
HIDDEN = np.zeros((SIDE, SIDE), bool)
HIDDEN[:, 4:] = True


def png(pixels: np.ndarray, hidden: np.ndarray | None = None, side=SIDE) -> bytes:
  file, image = io.BytesIO(), Image.fromarray(pixels)
  if hidden is not None:
    image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
  image.resize((side, side), Image.Resampling.NEAREST).save(file, format="PNG")
  return file.getvalue()


IMAGE, CLEAR = png(PIXELS), png(PIXELS, HIDDEN)
HUGE = png(PIXELS[..., 0] > 255, side=9111)  # in 10 kB
MASK = png(np.where(HIDDEN, 255, 0).astype(np.uint8))


@pytest.fixture(scope="module")
def server(image_model):
  limits = dataclasses.replace(live.LIMITS, upload_bytes=50_000)
  with live.serve(image_model, limits=limits, slots=4) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def opened(b64: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def post(server, path=EDITS, fields=(), **files):
  parts = {name: ("x.png", data, "image/png") for name, data in files.items()}
  return live.HTTP.post(f"{server.url}{path}", data=dict(fields), files=parts)


@pytest.mark.parametrize("mask", [MASK, CLEAR, None], ids=["white", "clear", "own"])
def test_what_is_not_hidden_stays(client, server, mask):
  given = {} if mask is None else {"mask": ("mask.png", mask)}
  response = client.images.edit(
    image=("image.png", CLEAR if mask is None else IMAGE), prompt="2", n=2,
    size="8x8", extra_body={"seed": 5}, **given,
  )  # fmt: skip
  images = [opened(image.b64_json) for image in response.data]
  for image in images:
    np.testing.assert_array_equal(image[:, :3], PIXELS[:, :3])
  assert (images[0][:, 4:] != images[1][:, 4:]).any()
  requests = server.engine.requests[-2:]
  assert [r.condition for r in requests] == [2, 2]
  assert all(r.is_known.reshape(4, 4)[:, :2].all() for r in requests)
  assert not any(r.is_known.reshape(4, 4)[:, 2:].any() for r in requests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's method
def test_variations_keep_a_share_of_the_codes(client, server):
  response = client.images.create_variation(image=("image.png", IMAGE), n=3)
  assert len(response.data) == 3
  requests = server.engine.requests[-3:]
  share = np.mean([r.is_known for r in requests])
  assert 0.2 < share < 0.8 and [r.condition for r in requests] == [4, 4, 4]
  assert (requests[0].is_known != requests[1].is_known).any()


def test_an_edit_is_streamed(client):
  stream = client.images.edit(
    image=[("image.png", IMAGE)], mask=("mask.png", MASK), prompt="1",
    stream=True, partial_images=2,
  )  # fmt: skip
  kinds = [event.type for event in stream]
  assert kinds[-1] == "image_edit.completed"
  assert set(kinds[:-1]) <= {"image_edit.partial_image"}


def test_images_that_are_not_square():
  limits = dataclasses.replace(
    live.LIMITS, size_policy="exact", upload_bytes=50_000, images=2
  )
  wide, mask = PIXELS[:4].repeat(2, 1), HIDDEN[:4].repeat(2, 1)
  with live.serve(live.tiny_model("wide", grid=(2, 8)), limits=limits) as server:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert client.models.retrieve("wide").model_extra["size"] == "16x4"
    [image] = client.images.generate(prompt="1", size="16x4").data
    assert opened(image.b64_json).shape == (4, 16, 3)
    with pytest.raises(
      openai.BadRequestError, match="'4x16': expected '16x4' or 'auto'"
    ):
      client.images.generate(prompt="1", size="4x16")
    file, image = io.BytesIO(), Image.fromarray(wide)
    image.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    image.save(file, format="PNG")
    [image] = client.images.edit(image=("x.png", file.getvalue()), prompt="1").data
    found = opened(image.b64_json)
    assert found.shape == wide.shape and (found[:, :7] == wide[:, :7]).all()


def test_an_image_of_another_size_is_fitted_and_said(server):
  large = png(PIXELS, HIDDEN, side=32)
  response = post(server, fields={"prompt": "1"}, image=large)
  assert response.status_code == 200
  assert response.json()["warnings"] == ["'image' 32x32: scaled and cropped to 8x8."]
  assert opened(response.json()["data"][0]["b64_json"]).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(
  "fields, files, status, param",
  [
    ({"prompt": "1"}, {}, 400, None),  # a form without files is no multipart
    ({"prompt": "1"}, {"mask": MASK}, 400, "image"),
    ({"prompt": "1"}, {"image": b"no image"}, 400, "image"),
    ({"prompt": "1"}, {"image": IMAGE[:60], "mask": MASK}, 400, "image"),
    ({"prompt": "1"}, {"image": IMAGE}, 400, "image"),  # nothing says what to draw
    ({"prompt": "1"}, {"image": IMAGE, "mask": png(PIXELS, side=4)}, 400, "mask"),
    ({"prompt": "1"}, {"image": IMAGE, "mask": png(0 * PIXELS, ~HIDDEN & HIDDEN)}, 400,
     "mask"),
    ({"prompt": "1"}, {"image": b"0" * 60_000}, 413, None),
    ({"prompt": "1"}, {"image": HUGE}, 400, "image"),
    ({"prompt": "1"}, {"image": IMAGE, "mask": HUGE}, 400, "mask"),
    ({}, {"image": CLEAR}, 400, "prompt"),
    ({"prompt": "99"}, {"image": CLEAR}, 400, "prompt"),
    ({"prompt": "1", "n": "9"}, {"image": CLEAR}, 400, "n"),
    ({"prompt": "1", "n": "two"}, {"image": CLEAR}, 400, "n"),
    ({"prompt": "1", "strength": "2"}, {"image": CLEAR}, 400, "strength"),
    ({"prompt": "1", "partial_images": "1"}, {"image": CLEAR}, 400, "partial_images"),
    ({"prompt": "1", "image": "text"}, {"mask": MASK}, 400, "image"),
    ({"prompt": "1", "model": "none"}, {"image": CLEAR}, 404, "model"),
  ],
)  # fmt: skip
def test_mistakes_are_named_and_hold_no_slot(server, fields, files, status, param):
  response = post(server, fields=fields, **files)
  error = response.json()["error"]
  assert response.status_code == status and error["param"] == param, error
  assert error.keys() == {"message", "type", "param", "code"}
  assert "0x" not in error["message"] and "Traceback" not in error["message"]
  assert server.is_idle()


def test_two_images_and_other_bodies_are_refused(server):
  parts = [("image[]", ("a.png", CLEAR)), ("image[]", ("b.png", CLEAR))]
  url = f"{server.url}{EDITS}"
  response = live.HTTP.post(url, data={"prompt": "1"}, files=parts)
  assert "expected one file, found 2" in response.json()["error"]["message"]
  assert live.HTTP.post(url, json={"prompt": "1"}).status_code == 400
  broken = {"Content-Type": "multipart/form-data; boundary=x"}
  assert live.HTTP.post(url, content=b"--y", headers=broken).status_code == 400


def test_a_server_without_edits_has_no_such_route(image_model):
  limits = dataclasses.replace(live.LIMITS, upload_bytes=0)
  with live.serve(image_model, limits=limits) as server:
    assert post(server, fields={"prompt": "1"}, image=CLEAR).status_code == 404
