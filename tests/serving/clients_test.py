"""Clients that nobody here wrote, by their default calls: each gives images.

They pin packages of their own, and are installed beside the tests, from PyPI and npm.
"""

import os
import shutil
import subprocess
import sys

from PIL import Image
import pytest

pytest.importorskip("uvicorn")

from tests.serving import live  # noqa: E402

pytestmark = [pytest.mark.extra, pytest.mark.slow]

PYTHON = ("openai>=3.57", "litellm>=1.110", "langchain-community>=0.4")
NODE = ("ai@>=6", "@ai-sdk/openai@>=3", "openai@>=6")
INSTALL_SECONDS, CALL_SECONDS = 900, 300

OPENAI = """
import openai
client = openai.OpenAI()
for name in ("dall-e-3", "gpt-image-1"):
  [image] = client.images.generate(model=name, prompt="1").data
  assert image.b64_json and image.url
images = client.images.generate(prompt="1", n=2, size="1024x1024", quality="hd").data
assert all(image.url for image in images) and len(images) == 2
"""
LITELLM = """
import os, litellm
for name in ("dall-e-2", "dall-e-3", "gpt-image-1"):
  response = litellm.image_generation(
    prompt="1", model=f"openai/{name}", api_base=os.environ["OPENAI_BASE_URL"]
  )
  assert response.data[0].url and response.data[0].b64_json
"""
LANGCHAIN = """
import os, urllib.request
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
url = DallEAPIWrapper(base_url=os.environ["OPENAI_BASE_URL"]).run("1")
assert urllib.request.urlopen(url).read().startswith(bytes([137]) + b"PNG")
"""
VERCEL = """
import * as ai from "ai";
import { createOpenAI } from "@ai-sdk/openai";
const generate = ai.generateImage ?? ai.experimental_generateImage;
const provider = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL });
for (const name of ["dall-e-2", "dall-e-3", "gpt-image-1"]) {
  const { image } = await generate({ model: provider.image(name), prompt: "1" });
  if (image.mediaType !== "image/png") throw new Error(image.mediaType);
}
const { images } = await generate({
  model: provider.image("dall-e-2"), prompt: "1", n: 2, size: "1024x1024", seed: 7,
});
if (images.length !== 2) throw new Error(`${images.length} images`);
"""
NODE_OPENAI = """
import OpenAI from "openai";
const client = new OpenAI();
const stream = await client.images.generate({
  model: "gpt-image-1", prompt: "1", stream: true, partial_images: 2,
});
const types = [];
for await (const event of stream) types.push(event.type);
if (types.length !== 3) throw new Error(types.join());
const response = await client.images.generate({ model: "dall-e-3", prompt: "1" });
if (!response.data[0].url || !response._request_id) throw new Error("no url or id");
"""
NODE_EDITS = """
import OpenAI, { toFile } from "openai";
import { readFileSync } from "node:fs";
const client = new OpenAI();
const file = (name) => toFile(readFileSync(name), name, { type: "image/png" });
const edited = await client.images.edit({
  image: await file("image.png"), mask: await file("mask.png"), prompt: "1", n: 2,
});
if (edited.data.length !== 2) throw new Error("not two images");
const stream = await client.images.edit({
  model: "gpt-image-1", image: [await file("image.png")], mask: await file("mask.png"),
  prompt: "1", stream: true, partial_images: 1,
});
const types = [];
for await (const event of stream) types.push(event.type);
if (types.at(-1) !== "image_edit.completed") throw new Error(types.join());
const varied = await client.images.createVariation({ image: await file("image.png") });
if (!varied.data[0].b64_json) throw new Error("no variation");
"""


@pytest.fixture(scope="module")
def url():
  with live.serve(live.tiny_model()) as server:
    yield f"{server.url}/v1"


def installed(command: list[str], cwd) -> None:
  done = subprocess.run(
    command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_SECONDS
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
  """An interpreter with the clients in Python."""
  folder = tmp_path_factory.mktemp("python")
  installed([sys.executable, "-m", "venv", str(folder)], folder)
  python = str(folder / "bin" / "python")
  installed([python, "-m", "pip", "install", "-q", *PYTHON], folder)
  return python


@pytest.fixture(scope="module")
def node(tmp_path_factory):
  """A folder with the clients in Node."""
  if shutil.which("npm") is None:
    pytest.skip("needs npm: apt install npm")
  folder = tmp_path_factory.mktemp("node")
  installed(["npm", "install", "--no-audit", "--no-fund", *NODE], folder)
  return folder


def call(command: list[str], url: str, cwd=None) -> None:
  own = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": url}
  done = subprocess.run(
    command, cwd=cwd, env=os.environ | own, capture_output=True, text=True,
    timeout=CALL_SECONDS,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", [OPENAI, LITELLM, LANGCHAIN],
                         ids=["openai", "litellm", "langchain"])  # fmt: skip
def test_python(url, python, code):
  call([python, "-c", code], url)


@pytest.mark.parametrize("code", [VERCEL, NODE_OPENAI, NODE_EDITS],
                         ids=["vercel", "openai", "openai-edits"])  # fmt: skip
def test_node(url, node, code):
  Image.new("RGB", (8, 8), "teal").save(node / "image.png")
  Image.linear_gradient("L").resize((8, 8)).save(node / "mask.png")
  (node / "client.mjs").write_text(code)
  call(["node", "client.mjs"], url, cwd=node)
