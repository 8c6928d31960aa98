"""Recipes beyond the published one, through the whole loop: resume, finetuning."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.classes import imagenet_classes, imagenet_names
from llamagen_jax.gpt.lora import LoRAConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.sampling.sample import sample
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import sample_scores, train_gpt
from llamagen_jax.training.export import load_run
from llamagen_jax.training.finetune import (
  TrainableConfig,
  init_params,
  merged,
  table_rows,
)
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.vision.inception import Features
from llamagen_jax.weights import bundle
from tests import tiny
from tests.gpt.tiny_gpt import forward

NAMES = tuple("abcd")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
  return tiny.write_codes(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A bundle to start from, of three classes, one of which is not in the data."""
  config = dataclasses.replace(tiny.GPT, num_classes=3)
  params = unbox(init_gpt(config, jax.random.key(5)))
  params["head"] = 0.1 * jax.random.normal(jax.random.key(6), params["head"].shape)
  path = tmp_path_factory.mktemp("published")
  gpt = bundle.Transformer(config, params, SamplingConfig(), "tiny", ("b", "z", "d"))
  bundle.save_gpt(path, gpt)
  return path


def same_classes(published, folder):
  """The same weights as a model of the data's four classes."""
  gpt = bundle.load_gpt(published)
  table = jnp.concatenate([gpt.params["condition"]["table"], jnp.ones((1, 32))])
  params = gpt.params | {"condition": {"table": table}}
  bundle.save_gpt(
    folder, dataclasses.replace(gpt, config=tiny.GPT, params=params, class_names=NAMES)
  )
  return folder


RECIPES = {
  "npp": {"objective": {"patch_phases": ((3, 3),)}},
  "rar": {"objective": {"random_order": (1, 3)}, "model": {"target_embedding": True}},
  "gft": {
    "objective": {"kind": "guidance-free"}, "model": {"guidance_embedding": True},
  },
  "cca": {"objective": {"kind": "contrastive", "accumulate": 2}},
  "noise": {"objective": {"code_noise": 0.5}},
  "muon": {"optimizer": {"kind": "muon"}},
  "lora": {"train": {"only": "none", "lora": {"rank": 2}}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resumes_bit_for_bit(codes, published, tmp_path, name):
  """Stopped before and after the change of a phase."""
  start = same_classes(published, tmp_path / "start")

  def config(steps):
    config = tiny.gpt_config(codes, steps)
    for section, fields in RECIPES[name].items():
      config[section] = {**config.get(section, {}), **fields}
    if name in ("cca", "lora"):
      config.init_from = str(start)
    return config

  state = train_gpt.train(config(5), tmp_path / "whole")
  for steps in (2, 4, 5):
    resumed = train_gpt.train(config(steps), tmp_path / "parts")
  jax.tree.map(np.testing.assert_array_equal, resumed, state)
  rows = [
    [
      row["loss"]
      for row in read_rows(tmp_path / run / "metrics.jsonl")
      if "loss" in row
    ]
    for run in ("whole", "parts")
  ]
  assert rows[0] == rows[1]
  step, gpt = load_run(tmp_path / "parts")
  assert step == 5
  jax.tree.map(
    np.testing.assert_array_equal, gpt.params,
    bundle.load_gpt(tmp_path / "whole/bundle").params,
  )  # fmt: skip
  if name == "cca":
    table = bundle.load_gpt(start).params["condition"]["table"]
    np.testing.assert_array_equal(resumed.reference["condition"]["table"], table)
    assert rows[0][0] != rows[0][1]


def test_a_class_table_of_another_size(codes, published, tmp_path):
  """Rows of the same names, the mean for the others, the row of no class kept."""
  config = tiny.gpt_config(codes, 1)
  config.optimizer.update(lr=0.0, warmup_steps=0)
  config.init_from = str(published)
  train_gpt.train(config, tmp_path / "run")
  old = bundle.load_gpt(published).params
  new = bundle.load_gpt(tmp_path / "run/bundle").params
  b, _, d, null = old["condition"]["table"]
  mean = jnp.mean(old["condition"]["table"][:3], axis=0)
  np.testing.assert_allclose(
    new["condition"]["table"], jnp.stack([mean, b, mean, d, null]), atol=1e-7
  )
  np.testing.assert_array_equal(new["head"], old["head"])


def test_rows_of_classes_by_name_or_wordnet_id():
  assert table_rows(("cat", "dog"), ("dog", "horse")) == [1, -1]
  names, ids = imagenet_names(), list(imagenet_classes())
  assert table_rows(names, ids) == [*range(1000)]
  assert table_rows(names, ("tench", ids[517], "my dog")) == [0, 517, -1]


def test_other_classes_of_the_same_number(codes, published, tmp_path):
  """The data has a, b, c, d; c was a row of the model, under another number."""
  gpt = bundle.load_gpt(same_classes(published, tmp_path / "old"))
  named = dataclasses.replace(gpt, class_names=("c", "x", "y", "d"))
  bundle.save_gpt(tmp_path / "start", named)
  config = tiny.gpt_config(codes, 1)
  config.optimizer.update(lr=0.0, warmup_steps=0)
  config.init_from = str(tmp_path / "start")
  train_gpt.train(config, tmp_path / "run")
  old = gpt.params["condition"]["table"]
  mean = jnp.mean(old[:4], axis=0)
  np.testing.assert_allclose(
    bundle.load_gpt(tmp_path / "run/bundle").params["condition"]["table"],
    jnp.stack([mean, mean, old[0], old[3], old[4]]), atol=1e-7,
  )  # fmt: skip


def test_fewer_classes_than_rows_are_told(codes, published, tmp_path, caplog):
  gpt = bundle.load_gpt(same_classes(published, tmp_path / "four"))
  six = dataclasses.replace(tiny.GPT, num_classes=6)
  table = jnp.zeros((7, 32)).at[:5].set(gpt.params["condition"]["table"])
  params = gpt.params | {"condition": {"table": table}}
  bundle.save_gpt(
    tmp_path / "six",
    dataclasses.replace(gpt, config=six, params=params, class_names=()),
  )
  config = tiny.gpt_config(codes, 1)
  config.model.num_classes = 6
  config.optimizer.update(lr=0.0, warmup_steps=0)
  config.init_from = str(tmp_path / "six")
  state = train_gpt.train(config, tmp_path / "run")
  assert "--config.model.num_classes=4 takes that of its name" in caplog.text
  np.testing.assert_array_equal(state.params["condition"]["table"], table)


@pytest.mark.parametrize("only", ["table", "head"])
def test_the_rest_stays_as_it_was(codes, published, tmp_path, only):
  config = tiny.gpt_config(codes, 2)
  config.train = {"only": only}
  config.optimizer.update(warmup_steps=0)
  config.init_from = str(same_classes(published, tmp_path / "start"))
  state = train_gpt.train(config, tmp_path / "run")
  old = bundle.load_gpt(tmp_path / "start").params
  trained = {"table": "condition", "head": "head"}[only]
  for name, leaves in old.items():
    changed = jax.tree.map(
      lambda a, b: bool((a != b).any()), leaves, state.params[name]
    )
    assert any(jax.tree.leaves(changed)) == (name == trained), name
  # Adam keeps moments of the trained weights alone.
  kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
  expected = sum(leaf.size for leaf in jax.tree.leaves(old[trained]))
  assert kept == 2 * expected


def test_adapters_begin_as_the_model_and_merge_into_it():
  config = TrainableConfig("none", LoRAConfig(2, 3.0))
  params = unbox(init_params(tiny.GPT, config, jax.random.key(0)))
  head = jax.random.normal(jax.random.key(1), params["head"].shape)
  params |= {"head": head}
  codes, labels = jnp.arange(9)[None], jnp.array([1])

  def logits(params):
    return forward(tiny.GPT, merged(config, params), codes, labels)

  plain = {name: leaf for name, leaf in params.items() if name != "lora"}
  np.testing.assert_array_equal(logits(params), logits(plain))
  keys = iter(jax.random.split(jax.random.key(2), 4))
  for adapter in params["lora"]["layers"].values():
    adapter["b"] = jax.random.normal(next(keys), adapter["b"].shape)
  full = merged(config, params)
  assert full.keys() == plain.keys()
  adapter, weight = params["lora"]["layers"]["ffn_in"], plain["layers"]["ffn"]["in"]
  for layer in range(tiny.GPT.layers):
    delta = np.einsum("Dr,rCF->DCF", adapter["a"][layer], adapter["b"][layer])
    np.testing.assert_allclose(
      full["layers"]["ffn"]["in"][layer], weight[layer] + 1.5 * delta, atol=1e-5
    )
  adapter, weight = params["lora"]["layers"]["out"], plain["layers"]["attention"]["out"]
  delta = np.einsum("LKGHr,LrD->LKGHD", adapter["a"], adapter["b"])
  np.testing.assert_allclose(
    full["layers"]["attention"]["out"], weight + 1.5 * delta, atol=1e-5
  )
  assert (logits(params) != logits(plain)).any()


def config_with_images(tmp_path, **images):
  """A run of two steps whose every evaluation samples images."""
  small = dataclasses.replace(tiny.GPT, vocab_size=16)
  data = tiny.write_codes(tmp_path / "codes", config=small)
  model = tiny.TOKENIZER
  params = unbox(init_tokenizer(model, jax.random.key(0)))
  identity = bundle.save_tokenizer(tmp_path / "tokenizer", model, params)
  manifest = json.loads((data / "manifest.json").read_text())
  (data / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": identity}))
  config = tiny.gpt_config(data, 2)
  config.model.vocab_size = 16
  config.run.eval_every = 1
  config.images = {"tokenizer": str(tmp_path / "tokenizer"), "count": 4, **images}
  return config


def test_images_of_fixed_classes_at_every_evaluation(tmp_path):
  train_gpt.train(config_with_images(tmp_path), tmp_path / "run")
  with Image.open(tmp_path / "run/samples.png") as image:
    assert image.size == (4 * (6 + 2) - 2, 6)


def test_images_of_another_tokenizer_are_refused_before_the_run(tmp_path):
  config = config_with_images(tmp_path)
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(1)))
  bundle.save_tokenizer(tmp_path / "other", tiny.TOKENIZER, params)
  refused = {"other": "other: tokenizer .*, the codes are of", "none": "no config.json"}
  for name, words in refused.items():
    config.images.tokenizer = str(tmp_path / name)
    with pytest.raises(UserError, match=words):
      train_gpt.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_scores_of_samples_at_every_evaluation(tmp_path, monkeypatch):
  """Of the averaged weights; the last one is that of the bundle's samples."""
  head = jax.random.normal(jax.random.key(0), (3, 5))

  def network(params, images):
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2))
    return Features(mean, mean, (mean - 127) / 5 @ params["head"])

  monkeypatch.setattr(sample_scores, "extract_features", network)
  monkeypatch.setattr(sample_scores, "load_inception", lambda path: {"head": head})
  monkeypatch.setattr(sample_scores, "BATCH_SIZE", 4)
  (tmp_path / "inception").touch()
  config = config_with_images(
    tmp_path, scored=10, inception=str(tmp_path / "inception"), seed=3
  )
  # Of about the colour that samples of this tokenizer have, so that some are near them.
  rng, tokenizer = (
    np.random.default_rng(5),
    bundle.load_tokenizer(tmp_path / "tokenizer"),
  )
  decoded = tokenizer.decode(rng.integers(0, 16, (50, 3, 3)))
  colour = np.mean((decoded + 1) * 127.5, axis=(0, 1, 2))
  real = np.broadcast_to(rng.normal(colour, 2, (9, 1, 1, 3)), (9, 6, 6, 3))
  real = real.astype(np.uint8)
  np.savez(tmp_path / "real.npz", arr_0=real)
  config.images.reference = str(tmp_path / "real.npz")
  train_gpt.train(config, tmp_path / "run")
  rows = read_rows(tmp_path / "run/metrics.jsonl")
  scores = [row["eval/IS"] for row in rows if "eval/IS" in row]
  assert len(scores) == sum("eval/loss" in row for row in rows) == 2
  gpt = bundle.load_gpt(tmp_path / "run/bundle")
  tokenizer = bundle.load_tokenizer(tmp_path / "tokenizer")
  labels = np.random.default_rng(3).integers(4, size=10)
  images = sample(gpt, tokenizer, labels.tolist(), seed=3)
  p = jax.nn.softmax((images.mean(axis=(1, 2)) - 127) / 5 @ head)
  kl = jnp.sum(p * (jnp.log(p) - jnp.log(p.mean(axis=0))), axis=1)
  assert scores[-1] > 1.05
  np.testing.assert_allclose(scores[-1], jnp.exp(kl.mean()), rtol=1e-4)
  means = [x.mean(axis=(1, 2)) for x in (real, images)]
  between, among = (np.linalg.norm(means[0][:, None] - x, axis=2) for x in means[::-1])
  radii = np.sort(among, axis=1)[:, 3]  # the nearest is itself
  share = np.mean(np.any(between <= radii[:, None], axis=0))
  assert 0 < share < 1
  np.testing.assert_allclose(rows[-1]["eval/precision"], share)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"scored": 8}, "images.scored=8: expected images.tokenizer and images.inception"),
    ({"scored": 8, "inception": "no.pth"}, "images.inception=no.pth: no such file"),
    ({"scored": -1}, "images.scored=-1: expected 0 or more"),
    ({"reference": "x.npz"}, "images.reference=x.npz: expected images.scored > 0"),
  ],
)
def test_scores_without_weights_are_refused(tmp_path, fields, words):
  with pytest.raises(UserError, match=words):
    train_gpt.train(config_with_images(tmp_path, **fields), tmp_path / "run")


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model": {"dim": 64}}, r"code_embedding is \(50, 32\), .* expects \(50, 64\)"),
    ({"model": {"qk_norm": True}}, "layers/attention/k_norm is missing"),
    ({"train": {"only": "tables"}}, "train.only='tables': expected one of all, table"),
    ({"train": {"only": "none"}}, "train.lora.rank=0: expected a rank > 0"),
    (
      {"train": {"only": "none", "lora": {"rank": 2, "targets": ("mlp",)}}},
      "unknown 'mlp'; expected of qkv",
    ),
    ({"objective": {"patch_phases": ((2, 5),)}}, "do not divide the grid of 3x3"),
    ({"objective": {"kind": "contrastive"}, "init_from": ""}, "expected --init-from"),
  ],
)  # fmt: skip
def test_bad_recipes_are_refused_in_one_line(codes, published, tmp_path, change, words):
  config = tiny.gpt_config(codes, 1)
  config.init_from = str(published)
  for section, fields in change.items():
    if isinstance(fields, dict):
      fields = {**config.get(section, {}), **fields}
    config[section] = fields
  with pytest.raises(UserError, match=words) as error:
    train_gpt.train(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run/config.json").exists()
