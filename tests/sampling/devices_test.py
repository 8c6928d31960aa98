"""Images are the same on one device and on eight."""

import dataclasses
import os
import subprocess
import sys

import jax
from PIL import Image
import pytest

from llamagen_jax import SamplingConfig, TokenizerConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

pytestmark = pytest.mark.exact


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  # As wide as the digits' own, so that sums are long enough to round.
  vq = TokenizerConfig(
    (1, 1, 2), width=16, latent_width=32, codebook_size=128, norm_groups=8
  )
  params = unbox(init_tokenizer(vq, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "vq", vq, params)
  config = dataclasses.replace(tiny.GPT, grid=8, vocab_size=128)
  params = unbox(init_gpt(config, jax.random.key(1)))
  params["head"] = jax.random.normal(jax.random.key(2), params["head"].shape)
  model = bundle.Transformer(config, params, SamplingConfig(top_k=20), identity)
  bundle.save_gpt(folder / "gpt", model)
  return folder


def written(saved, out, devices, command) -> bytes:
  """Runs a verb on a number of fake devices; returns the file that it writes."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  command += f" --gpt {saved}/gpt --tokenizer {saved}/vq --seed 3 --out {out}"
  subprocess.run(
    [
      sys.executable,
      "-c",
      "from llamagen_jax.commands.cli import main; main()",
      *command.split(),
    ],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    check=True,
  )
  return out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "edit"])
def test_one_device_and_eight(saved, tmp_path, verb):
  Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "image.png")
  command = {
    "sample": "sample --fid-batch 64 --batch-size 8",
    "edit": f"edit --image {tmp_path}/image.png --mask {tmp_path}/image.png"
    " --classes 0-2 --count 3 --candidates 4 --strength 0.8",
  }[verb]
  one = written(saved, tmp_path / "one.npz", 1, command)
  assert written(saved, tmp_path / "eight.npz", 8, command) == one
