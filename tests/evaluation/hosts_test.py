"""`llamagen evaluate` on two hosts."""

import json

import numpy as np
from PIL import Image
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.images import save_npz
from tests.processes import on_two_hosts

COUNT = 7  # not the same on both hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("hosts"), np.random.default_rng(0)
  images = rng.integers(0, 256, (2, COUNT, 20, 20, 3), np.uint8)
  images[1] //= 4  # darker samples: FID of like sets is all rounding (1e-7)
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


@pytest.mark.slow
def test_two_hosts_and_one(folder, inception):
  outputs = on_two_hosts(command(folder, inception, "two"))
  assert ["sha256" in output for output in outputs] == [True, False]
  assert cli.run(command(folder, inception, "one")) == 0
  one, two = (json.loads((folder / f"{n}.json").read_text()) for n in ("one", "two"))
  assert one["samples"] == two["samples"] and one["inception"] == two["inception"]
  for name, row in one["scores"].items():
    np.testing.assert_allclose(two["scores"][name]["ours"], row["ours"], rtol=1e-5)
