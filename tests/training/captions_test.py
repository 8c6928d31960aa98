"""Training on captions: padding, `valid`, features stored, ragged and on the fly."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from llamagen_jax import generate
from llamagen_jax.commands import cli
from llamagen_jax.commands.extract_text import extract_text
from llamagen_jax.commands.prepare_captions import prepare
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.codes import CodeRecord, CodeShardSpec, CodeSource, CodeWriter
from llamagen_jax.data.features import FeatureSource
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.objective import cross_entropy, sample_weights
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.text.t5 import T5Config, init_t5, padded_features
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training.captions import Captions, PairInput, PairSource
from llamagen_jax.training.recipe import build
from llamagen_jax.training.sample_grid import ImagesConfig, SampleGrid
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5
from tests import tiny
from tests.gpt.tiny_gpt import forward

T5 = T5Config(60, 16, layers=2, heads=2, head_dim=8, ffn_dim=24)
MODEL = dataclasses.replace(
  tiny.GPT, condition="caption", caption_tokens=20, caption_dim=16
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A tar of nine samples -> captions, features in bfloat16 and float32, codes."""
  folder = tmp_path_factory.mktemp("captions")
  params = jax.device_get(unbox(init_t5(T5, jax.random.key(0))))
  tiny.write_t5(folder / "t5", T5, params)
  tiny.write_tar(folder / "0.tar", 0, 5, {"000000002.txt": b"http://a.b/c"})
  tiny.write_tar(folder / "1.tar", 5, 4)
  prepare(
    f"webdataset:{folder}/*.tar", folder / "captions",
    keys=FieldNames("", "top_caption"),
    images="", min_side=8, shard_count=1, workers=1,
  )  # fmt: skip
  for dtype in ("bfloat16", "float32"):
    extract_text(
      folder / "t5", folder / "captions", folder / dtype, tokens=20, batch_size=4,
      dtype=dtype,
    )  # fmt: skip
  write_codes(folder / "codes", range(9))
  return folder


def write_codes(folder, samples):
  plan = CodeShardSpec(
    tokenizer="tiny", tokenizer_config={}, image_size=6, grid=3, codebook_size=50,
    crops=("center",), class_names=(), source="captions", samples=9, shards=1,
  )  # fmt: skip
  rng, writer = np.random.default_rng(0), CodeWriter(folder, plan)
  codes = rng.integers(0, 50, (9, 1, 9))
  skipped = {i: "broken" for i in range(9) if i not in samples}
  records = [CodeRecord(f"{i:09d}", -1, codes[i]) for i in samples]
  writer.write_shard(0, records, skipped)
  writer.finish()


def config(data, objective=None, **changes):
  recipe = tiny.gpt_config(data / "codes", 3, batch_size=4)
  recipe.objective = objective or {}
  recipe.model = dataclasses.asdict(MODEL)
  recipe.data.update(
    texts=str(data / "bfloat16"), eval_texts=str(data / "bfloat16"), **changes
  )
  return recipe


@pytest.fixture(scope="module")
def params():
  params = unbox(init_gpt(MODEL, jax.random.key(0)))
  head = jax.random.normal(jax.random.key(1), params["head"].shape) / 8
  return params | {"head": head}


def batch_of(source, transform, rows):
  rows = [transform.first(source[i]) for i in rows]
  return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def loss(params, batch):
  logits = forward(MODEL, params, batch["codes"], batch["features"], batch["mask"])
  loss_B = jnp.mean(cross_entropy(logits, batch["codes"]), axis=1)
  return jnp.sum(loss_B * sample_weights(batch))


def test_features_on_disk(data):
  captions, features = CaptionSource(data / "captions"), FeatureSource(data / "float32")
  encoder = load_t5(data / "t5", dtype="float32")
  assert features.manifest["t5"] == encoder.identity
  assert features.manifest["records"] == len(features) == len(captions) == 9
  for i in (0, 2, 8):
    caption, found = captions[i], features[i]
    assert found.key == caption.key
    for text, rows in ((caption.caption, found.caption), (caption.short, found.short)):
      ids, mask = encoder.tokens.rows([text], 20)
      expected, _ = padded_features(encoder.config, encoder.params, ids, mask)
      assert len(rows) == mask.sum()
      last = np.asarray(expected[0, 20 - len(rows) :]).astype(rows.dtype)
      np.testing.assert_allclose(
        rows.astype(np.float32), last.astype(np.float32), atol=2e-2
      )
  assert len(features[2].caption) == 0  # an address only
  assert features.manifest["empty"] == 1
  packed = sum(len(features[i].pack()) for i in range(9))
  assert packed == features.manifest["rows"] * 16 * 2 + 9 * (6 + 9)


def test_a_caption_alone_equals_itself_among_longer_ones(data, params):
  source = PairSource(CodeSource(data / "codes"), FeatureSource(data / "float32"))
  transform = PairInput(20, None, 0.0)
  batch = batch_of(source, transform, [0, 1, 3])
  names = ("codes", "features", "mask")
  together = forward(MODEL, params, *(batch[n] for n in names))
  for row in range(3):
    alone = forward(MODEL, params, *(batch[n][row : row + 1] for n in names))
    np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
  noise = jax.random.normal(jax.random.key(0), batch["features"].shape)
  noisy = jnp.where(batch["mask"][..., None] > 0, batch["features"], noise)
  hidden = forward(MODEL, params, batch["codes"], noisy, batch["mask"])
  np.testing.assert_allclose(hidden, together, atol=1e-5)


def test_longer_padding_changes_nothing(data, params):
  """A model that leaves more room for captions computes the same."""
  source = PairSource(CodeSource(data / "codes"), FeatureSource(data / "float32"))
  condition = dict(params["condition"])
  fixed = condition["unconditional"]
  condition["unconditional"] = jnp.pad(fixed, ((13, 0), (0, 0)))
  greedy, key = SamplingConfig(greedy=True), jax.random.key(0)
  logits, codes = [], []
  for tokens, weights in ((20, params), (33, params | {"condition": condition})):
    batch = batch_of(source, PairInput(tokens, None, 0.0), [0, 1, 3])
    model = dataclasses.replace(MODEL, caption_tokens=tokens)
    texts = batch["features"].astype(jnp.float32), batch["mask"]
    logits.append(forward(model, weights, batch["codes"], *texts))
    codes.append(generate(model, weights, texts[0], key, texts[1], greedy))
  np.testing.assert_allclose(*logits, atol=1e-5)
  np.testing.assert_array_equal(*codes)


def test_stored_padded_and_on_the_fly_give_the_same_loss(data, params):
  codes = CodeSource(data / "codes")
  rows = [0, 1, 3, 8]
  stored = PairSource(codes, FeatureSource(data / "bfloat16"))
  ragged = batch_of(stored, PairInput(20, None, 0.0), rows)
  captions = Captions(MODEL, str(data / "t5"), "bfloat16", 0.0)
  (live,) = captions.open([codes], str(data / "captions"))
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
  on_the_fly = captions.features(batch_of(live, captions.input, rows), mesh)
  assert captions.encoder_identity(live, mesh) == stored.texts.manifest["t5"]
  np.testing.assert_array_equal(on_the_fly["mask"], ragged["mask"])
  expected = loss(params, ragged)
  np.testing.assert_allclose(loss(params, on_the_fly), expected, rtol=2e-3)
  encoder = load_t5(data / "t5", dtype="float32")
  texts = [CaptionSource(data / "captions")[i].caption for i in rows]
  ids, mask = encoder.tokens.rows(texts, 20)
  features, mask = padded_features(encoder.config, encoder.params, ids, mask)
  padded = ragged | {"features": features, "mask": mask}
  exact = batch_of(
    PairSource(codes, FeatureSource(data / "float32")), PairInput(20, None, 0.0), rows
  )
  stored_padded = exact | {"features": padded["features"].astype(jnp.bfloat16)}
  np.testing.assert_allclose(
    loss(params, exact), loss(params, stored_padded), rtol=1e-5
  )


def test_samples_that_are_not_valid_change_nothing(data, params):
  source = PairSource(CodeSource(data / "codes"), FeatureSource(data / "float32"))
  batch = batch_of(source, PairInput(20, None, 0.0), [0, 1, 2, 3])
  assert batch["valid"].tolist() == [1, 1, 0, 1]
  grads = jax.jit(jax.value_and_grad(loss))
  found = grads(params, batch)
  changed = batch | {
    "codes": batch["codes"].at[2].set(7),
    "features": batch["features"].at[2].set(3.0),
  }
  jax.tree.map(np.testing.assert_array_equal, grads(params, changed), found)
  without = {name: value[jnp.array([0, 1, 3])] for name, value in batch.items()}
  expected = grads(params, without)
  assert np.isclose(found[0], expected[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[1], expected[1]
  )
  none = batch | {"valid": jnp.zeros(4)}
  assert grads(params, none)[0] == 0


@pytest.mark.parametrize("slices", [1, 2])
def test_a_step_of_training_ignores_samples_that_are_not_valid(data, slices):
  """Dropout included: the weights after it are the same, bit for bit."""
  source = PairSource(CodeSource(data / "codes"), FeatureSource(data / "float32"))
  batch = batch_of(source, PairInput(20, None, 0.0), [0, 1, 2, 3])
  changed = batch | {
    "codes": batch["codes"].at[2].set(7),
    "features": batch["features"].at[2].set(3.0),
    "mask": batch["mask"].at[2].set(1),
  }
  recipe = build(gpt_train.GPTRecipe, config(data, objective={"accumulate": slices}))
  step = jax.jit(functools.partial(gpt_train.train_step, recipe))
  state = unbox(gpt_train.init_state(recipe, jax.random.key(0)))
  for _ in range(3):  # as long as the head is zero, there is no gradient below it
    state, _ = step(state, batch)
  found, expected = step(state, changed), step(state, batch)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  counted = step(state, changed | {"valid": jnp.ones(4)})
  assert counted[1]["loss"] != expected[1]["loss"]


def test_short_captions_are_drawn_as_often_as_asked(data):
  source = PairSource(CodeSource(data / "codes"), FeatureSource(data / "float32"))
  pair, rng = source[0], np.random.default_rng(0)
  long, short = len(pair[1].caption), len(pair[1].short)
  assert long != short
  counts = [PairInput(20, None, 0.3)(pair, rng)["mask"].sum() for _ in range(2000)]
  assert set(counts) == {long, short}
  assert abs(np.mean(np.array(counts) == short) - 0.3) < 0.03


def test_missing_and_foreign_samples(data, tmp_path):
  features = FeatureSource(data / "float32")
  write_codes(tmp_path / "some", [0, 1, 4, 8])
  source = PairSource(CodeSource(tmp_path / "some"), features)
  assert [source[i][1].key for i in range(4)] == [f"{i:09d}" for i in (0, 1, 4, 8)]
  write_codes(tmp_path / "turned", [*range(7), 8, 7])
  with pytest.raises(UserError, match="sample 000000008 of .*turned is not where"):
    PairSource(CodeSource(tmp_path / "turned"), features)[7]
  tiny.write_codes(tmp_path / "others", records=8)
  with pytest.raises(UserError, match="made of 8 samples, .* has 9"):
    PairSource(CodeSource(tmp_path / "others"), features)


@pytest.mark.slow
def test_training_stage_one_and_two(data, tmp_path):
  """Stored and on the fly; the second stage starts from the first at another size."""
  state = gpt_train.train(config(data), tmp_path / "stored")
  lines = (tmp_path / "stored" / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  first = next(r["loss"] for r in rows if "loss" in r)
  assert abs(first - np.log(50)) < 1e-5
  gpt = bundle.load_gpt(tmp_path / "stored" / "bundle")
  assert gpt.text_encoder == load_t5(data / "t5", dtype="bfloat16").identity
  fresh = unbox(init_gpt(MODEL, jax.random.key(0)))["condition"]["unconditional"]
  np.testing.assert_array_equal(gpt.params["condition"]["unconditional"], fresh)

  recipe = config(data, t5=str(data / "t5"))
  recipe.data.update(texts=str(data / "captions"), eval_texts=str(data / "captions"))
  live = gpt_train.train(recipe, tmp_path / "live")
  assert jax.tree.all(
    jax.tree.map(lambda a, b: np.allclose(a, b, atol=2e-2), state.params, live.params)
  )

  wide = dataclasses.replace(MODEL, grid=2)
  plan = CodeShardSpec(
    tokenizer="tiny", tokenizer_config={}, image_size=4, grid=2, codebook_size=50,
    crops=("center",), class_names=(), source="captions", samples=9, shards=1,
  )  # fmt: skip
  writer = CodeWriter(tmp_path / "codes", plan)
  codes = np.random.default_rng(0).integers(0, 50, (9, 1, 4))
  writer.write_shard(0, [CodeRecord(f"{i:09d}", -1, codes[i]) for i in range(9)], {})
  writer.finish()
  second = config(data, short_share=0.3)
  second.data.update(codes=str(tmp_path / "codes"), eval_codes=str(tmp_path / "codes"))
  second.model = dataclasses.asdict(wide)
  second.init_from = str(tmp_path / "stored")
  second.optimizer.lr = 0.0
  second.optimizer.weight_decay = 0.0
  begun = gpt_train.train(second, tmp_path / "second")
  jax.tree.map(np.testing.assert_array_equal, begun.params, gpt.params)
  about = tmp_path / "stored/bundle/config.json"
  stored = json.loads(about.read_text())
  about.write_text(json.dumps(stored | {"text_encoder": "another"}))
  with pytest.raises(UserError, match="the features of text encoder another, data.tex"):
    gpt_train.train(second, tmp_path / "third")
  about.write_text(json.dumps(stored))
  second.model.dim = 64
  with pytest.raises(UserError, match="code_embedding is .50, 32., this"):
    gpt_train.train(second, tmp_path / "third")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"texts": ""}, "data.texts and --config.data.eval_texts are missing"),
    ({"texts": "{f}/captions"}, "kind 'captions'"),
    ({"t5": "{f}/t5"}, "kind 'features'"),
    ({"t5": "{f}/none"}, "none: no tokenizer"),
  ],
)
def test_bad_configs(data, tmp_path, changes, words):
  recipe = config(data)
  recipe.data.update({k: v.format(f=data) for k, v in changes.items()})
  with pytest.raises(UserError) as error:
    gpt_train.train(ml_collections.ConfigDict(recipe), tmp_path / "x")
  assert words in str(error.value)


def test_images_of_captions_need_an_encoder_and_prompts(data, tmp_path):
  tokenizer = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(tmp_path / "vq", tiny.TOKENIZER, tokenizer)
  images = ImagesConfig(str(tmp_path / "vq"))
  for prompts, t5 in ((), "t5"), (("a fox",), ""):
    asked = dataclasses.replace(images, prompts=prompts)
    with pytest.raises(UserError, match="captions needs data.t5 and images.prompts"):
      SampleGrid(asked, identity, "caption", t5)
  SampleGrid(dataclasses.replace(images, prompts=("a fox",)), identity, "caption", "t5")


def test_extract_text_is_resumed(data, tmp_path, monkeypatch, capsys):
  """Killed after the first shard; the verb ends with the same files."""
  flags = f"--t5={data}/t5 --captions={data}/captions --out={tmp_path}/out --tokens=20"
  from llamagen_jax.commands import extract_text

  def stop(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(
    extract_text, "_write_shard", stop_after(1, extract_text._write_shard, stop)
  )
  assert cli.run(["extract-text", *flags.split(), "--batch-size=4"]) == 75
  monkeypatch.undo()
  assert not (tmp_path / "out" / "manifest.json").exists()
  assert cli.run(["extract-text", *flags.split(), "--batch-size=4"]) == 0
  assert "GB per million captions" in capsys.readouterr().out
  for path in (data / "bfloat16").iterdir():
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def stop_after(count, work, stop):
  done = iter(range(count + 1))
  return lambda *args: work(*args) if next(done) < count else stop(*args)
