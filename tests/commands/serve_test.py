"""`llamagen serve` as a process: OpenAI's client, SIGTERM, kill -9, bad flags."""

import base64
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import llamagen_jax as lg  # noqa: E402
from llamagen_jax.commands import cli, serve  # noqa: E402
from llamagen_jax.serving import http_server  # noqa: E402
from llamagen_jax.weights import bundle  # noqa: E402
from tests.sampling import fid_batch_test  # noqa: E402

saved = fid_batch_test.saved
SECONDS = 120


class Process:
  """A running server."""

  def __init__(self, saved, *flags: str):
    command = f"serve --gpt {saved}/gpt --tokenizer {saved}/vq --port 0 --no-demo"
    python = [
      sys.executable,
      "-c",
      "from llamagen_jax.commands.cli import main; main()",
    ]
    self.process = subprocess.Popen(
      [*python, *command.split(), *flags], stdout=subprocess.PIPE, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    self.url = re.search(r"http://[\d.:]+", self.process.stdout.readline())[0]
    end = time.monotonic() + SECONDS
    while httpx.get(f"{self.url}/ready").status_code != 200:
      assert time.monotonic() < end and self.process.poll() is None
      time.sleep(0.1)

  def generate(self, **body) -> httpx.Response:
    path = f"{self.url}/v1/images/generations"
    return httpx.post(path, json=body, timeout=SECONDS)


@contextlib.contextmanager
def running(saved, *flags: str):
  server = Process(saved, *flags)
  try:
    yield server
  finally:
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def server(saved):
  with running(saved, "--slots=2", "--chunk=2", "--queue=50") as server:
    yield server


def opened(b64: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_the_openai_client(server):
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
  [model] = client.models.list().data
  assert model.id == "gpt"
  response = client.images.generate(prompt="class:2", n=3, model=model.id)
  assert [opened(image.b64_json).shape for image in response.data] == [(6, 6, 3)] * 3
  stream = client.images.generate(
    prompt="1", stream=True, partial_images=2, extra_body={"guidance_scale": 3.0}
  )
  kinds = [event.type.removeprefix("image_generation.") for event in stream]
  assert kinds == ["partial_image", "partial_image", "completed"]


@pytest.mark.parametrize("sampling", [
  {}, {"guidance_scale": 3.0, "guidance_schedule": "linear", "top_k": 7},
  {"temperature": 0.7, "top_p": 0.8},
])  # fmt: skip
def test_the_images_of_sample(saved, server, sampling):
  """Beside other requests, and in another batch than `sample` generates."""
  gpt, tokenizer = lg.load_gpt(saved / "gpt"), lg.load_tokenizer(saved / "vq")
  expected = lg.sample(gpt, tokenizer, [2, 2, 0, 0], seed=11, **sampling)
  with ThreadPoolExecutor(9) as pool:
    noise = [
      pool.submit(server.generate, prompt="3", n=2, temperature=2) for _ in range(8)
    ]
    response = server.generate(class_labels=[2, 0], n=2, seed=11, **sampling)
    assert {future.result().status_code for future in noise} == {200}
  found = [opened(image["b64_json"]) for image in response.json()["data"]]
  np.testing.assert_array_equal(found, expected)


def held_or_done(server) -> float:
  """Images that wait, are being generated, or are done."""
  text = httpx.get(f"{server.url}/metrics").text
  names = ("queue_length", "slots_busy", "images_total")
  patterns = [rf'^llamagen_{name}{{model="gpt"}} (\S+)' for name in names]
  return sum(float(re.search(pattern, text, re.M)[1]) for pattern in patterns)


def test_sigterm_finishes_what_was_accepted(saved):
  with running(saved, "--slots=1", "--chunk=1", "--queue=50") as server:
    with ThreadPoolExecutor(10) as pool:
      posts = [pool.submit(server.generate, prompt="1", n=4) for _ in range(10)]
      # All are in then; the three numbers are of three moments.
      while held_or_done(server) < 38:
        time.sleep(0.01)
      server.process.send_signal(signal.SIGTERM)
      answers = [post.result() for post in posts]
    assert [answer.status_code for answer in answers] == [200] * 10
    assert server.process.wait(SECONDS) == 0
    with pytest.raises(httpx.TransportError):
      server.generate(prompt="1")


@pytest.mark.slow
def test_killed_and_started_again(saved):
  bodies = []
  for _ in range(2):
    with running(saved, "--slots=2") as server:
      response = server.generate(prompt="1", seed=4, response_format="b64_json")
      bodies.append(response.json()["data"])
      server.process.kill()  # and so at once
  assert bodies[0] == bodies[1]


@pytest.mark.parametrize("flags, words", [
  ("", "--gpt and --tokenizer, or --workdir"),
  ("--workdir=x --gpt=y", "--workdir stands for"),
  ("--workdir=nothing", "nothing/gpt/bundle: no config.json"),
  ("--gpt x y --tokenizer a b c", "--tokenizer: 3 for 2 transformers"),
  ("--gpt=x --gpt=y --tokenizer=a --name=z", "--name: 1 for 2 transformers"),
  ("--gpt a/gpt/bundle b/gpt/bundle --tokenizer=y", "models gpt, gpt: expected names"),
  ("--workdir=gs://bucket/run", "--workdir=gs://bucket/run"),
  ("--gpt=x --tokenizer=y --public-url=art.example", "--public-url=art.example"),
  ("--gpt=x --tokenizer=y --size-policy=any", "--size-policy"),
  ("--gpt=x --tokenizer=y --slots=0", "--slots: 0: expected 1 or more"),
  ("--gpt=x --tokenizer=y --port=70000", "--port=70000"),
  ("--gpt=x --tokenizer=y --address=no.such.host.", "--address=no.such.host."),
])  # fmt: skip
def test_bad_flags(flags, words, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.run(["serve", "--port=0", *flags.split()]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1


def test_the_examples_of_a_workdir_are_offered_unless_others_are_given(tmp_path):
  (tmp_path / "examples.txt").write_text("a red heart\na cat\n")
  options = serve.ServeOptions(workdir=str(tmp_path))
  assert serve._complete(options).example == ("a red heart", "a cat")
  options = dataclasses.replace(options, example=("a dog",))
  assert serve._complete(options).example == ("a dog",)


def test_two_models_that_share_a_tokenizer(saved):
  flags = f"--gpt={saved}/gpt --name small again --slots=2 --any-model".split()
  with running(saved, *flags) as server:
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["small", "again"]
    for asked, answers in [("again", "again"), ("other", "small")]:
      response = server.generate(prompt="1", model=asked)
      assert response.json()["model"] == answers


def test_the_sizes_of_a_model(saved, tmp_path):
  gpt = lg.load_gpt(saved / "gpt")
  config = dataclasses.replace(gpt.config, other_grids=((2, 4),))
  gpt = dataclasses.replace(gpt, config=config)
  bundle.save_gpt(tmp_path / "both", gpt)
  tokenizer = lg.load_tokenizer(saved / "vq")
  flags = f"--gpt={tmp_path}/both --slots=2 --candidates=0".split()
  with running(saved, *flags) as server:
    _, model = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["id"], model["sizes"]) == ("both", ["6x6", "8x4"])
    for size, image_size in (("auto", 6), ("8x4", (4, 8))):
      body = {"model": "both", "prompt": "1", "size": size, "seed": 3}
      response = server.generate(**body).json()
      expected = lg.sample(gpt, tokenizer, [1], image_size=image_size, seed=3)
      found = [opened(image["b64_json"]) for image in response["data"]]
      np.testing.assert_array_equal(found, expected)
    metrics = httpx.get(f"{server.url}/metrics").text
  assert 'llamagen_images_total{model="both 8x4"} 1.0' in metrics


@pytest.mark.parametrize("flags, said", [("", True), ("--no-demo", False)])
def test_says_that_the_demo_is_missing(saved, monkeypatch, capsys, flags, said):
  find_spec = importlib.util.find_spec

  def without_gradio(name, *args):
    return None if name == "gradio" else find_spec(name, *args)

  monkeypatch.setattr(importlib.util, "find_spec", without_gradio)
  monkeypatch.setattr(http_server, "run", lambda *args: None)
  command = f"serve --gpt {saved}/gpt --tokenizer {saved}/vq --port 0 {flags}"
  assert cli.run(command.split()) == 0
  line = "no demo: it needs pip install 'llamagen_jax[demo]'"
  assert (line in capsys.readouterr().out) == said


def test_a_port_that_is_taken(server, saved, capsys):
  port = server.url.rpartition(":")[2]
  command = f"serve --gpt {saved}/gpt --tokenizer {saved}/vq --port {port}"
  assert cli.run(command.split()) == 2
  assert f"--port={port}" in capsys.readouterr().err
