"""Adapters of a run on the model that it started from, and on another one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import cli
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import train_gpt
from llamagen_jax.weights import bundle
from llamagen_jax.weights.adapter import apply_adapter
from tests import tiny
from tests.gpt.tiny_gpt import forward

GPT_CONFIG = dataclasses.replace(tiny.GPT, vocab_size=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A folder of `tokenizer`, `start` (three classes) and a LoRA run of four, `run`."""
  folder = tmp_path_factory.mktemp("adapter")
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "tokenizer", tiny.TOKENIZER, params)
  codes = tiny.write_codes(folder / "codes", config=GPT_CONFIG)
  manifest = json.loads((codes / "manifest.json").read_text())
  (codes / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": identity}))
  three = dataclasses.replace(GPT_CONFIG, num_classes=3)
  params = unbox(init_gpt(three, jax.random.key(1)))
  params["head"] = 0.3 * jax.random.normal(jax.random.key(2), params["head"].shape)
  sampling = SamplingConfig(guidance_scale=2.0)
  start = bundle.Transformer(three, params, sampling, identity, tuple("abc"))
  bundle.save_gpt(folder / "start", start)
  config = tiny.gpt_config(codes, 2)
  config.model.vocab_size = 16
  config.train = {"only": "table", "lora": {"rank": 2}}
  config.optimizer.update(lr=0.1, warmup_steps=0, ema=0.0)
  config.init_from = str(folder / "start")
  train_gpt.train(config, folder / "run")
  return folder


def test_an_adapter_gives_the_model_of_the_run(run):
  gpt = apply_adapter(run / "run/adapter", bundle.load_gpt(run / "start"))
  expected = bundle.load_gpt(run / "run/bundle")
  assert (gpt.config, gpt.class_names) == (GPT_CONFIG, tuple("abcd"))
  codes, labels = jnp.arange(9)[None], jnp.array([3])
  logits, trained, before = (
    forward(GPT_CONFIG, params, codes, labels)
    for params in (
      gpt.params, expected.params,
      bundle.load_gpt(run / "start").params | {"condition": gpt.params["condition"]},
    )
  )  # fmt: skip
  np.testing.assert_allclose(logits, trained, atol=1e-5)
  assert np.abs(logits - before).max() > 1e-2
  sizes = [
    sum(path.stat().st_size for path in (run / "run" / name).rglob("*"))
    for name in ("adapter", "bundle")
  ]
  assert sizes[0] < sizes[1]


def test_what_was_chosen_on_loading_stays(run):
  gpt = bundle.load_gpt(run / "start", dtype="bfloat16", kv_cache="int8")
  config = apply_adapter(run / "run/adapter", gpt).config
  assert (config.dtype, config.kv_cache) == ("bfloat16", "int8")


def test_an_adapter_of_another_model_is_refused(run):
  start = bundle.load_gpt(run / "start")
  other = start.params | {"norm": start.params["norm"] * 1.01}
  with pytest.raises(UserError, match="an adapter of another model"):
    apply_adapter(run / "run/adapter", dataclasses.replace(start, params=other))
  with pytest.raises(UserError, match="kind 'gpt', expected 'adapter'"):
    apply_adapter(run / "start", start)


def test_samples_of_a_run_and_of_an_adapter_equal_the_bundles(run, capsys):
  def sample(*words):
    out = run / f"{len(list(run.glob('*.npz')))}.npz"
    tokenizer = f"--tokenizer={run / 'tokenizer'}"
    assert cli.run(["sample", *words, tokenizer, "--classes=0,3", f"--out={out}"]) == 0
    return np.load(out)["arr_0"]

  expected = sample(f"--gpt={run / 'run/bundle'}")
  np.testing.assert_array_equal(sample(f"--workdir={run / 'run'}"), expected)
  adapter = f"--adapter={run / 'run/adapter'}"
  np.testing.assert_array_equal(sample(f"--gpt={run / 'start'}", adapter), expected)
  words = ["sample", "--tokenizer=x", "--classes=0", "--out=x.npz"]
  assert cli.run(words) == 2
  assert "expected either --gpt or --workdir" in capsys.readouterr().err
