"""`llamagen evaluate` on two hosts."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from llamagen_jax import cli
from llamagen_jax.pictures import save_npz

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 7  # not the same on both hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("hosts"), np.random.default_rng(0)
  images = rng.integers(0, 256, (2, COUNT, 20, 20, 3), np.uint8)
  save_npz(folder / "reference.npz", [images[0]], COUNT, None)
  (folder / "samples").mkdir()
  for i, image in enumerate(images[1]):
    Image.fromarray(image).save(folder / "samples" / f"{i}.png")
  return folder


def command(folder, inception, name, *flags):
  return [
    "evaluate", f"--samples={folder / 'samples'}", "--protocol=custom",
    f"--reference={folder / 'reference.npz'}", f"--out={folder / name}.json",
    f"--inception={inception}", f"--cache={folder / name}",
    "--inception-batch=2", *flags,
  ]  # fmt: skip


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_and_one(folder, inception):
  port = free_port()
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  processes = []
  for host in range(2):
    flags = [f"--coordinator=127.0.0.1:{port}", "--hosts=2", f"--host={host}"]
    words = command(folder, inception, "two", *flags)
    python = [sys.executable, "-c", "from llamagen_jax import cli; cli.main()"]
    processes.append(
      subprocess.Popen(
        [*python, *words], env=environment, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
      )
    )  # fmt: skip
  for host, process in enumerate(processes):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert ("sha256" in output) == (host == 0)
  assert cli.run(command(folder, inception, "one")) == 0
  one, two = (json.loads((folder / f"{n}.json").read_text()) for n in ("one", "two"))
  assert one["samples"] == two["samples"] and one["inception"] == two["inception"]
  for name, row in one["scores"].items():
    np.testing.assert_allclose(two["scores"][name]["ours"], row["ours"], rtol=1e-5)
