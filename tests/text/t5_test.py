import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.text.t5 import T5Config, encode, left_pad, relative_buckets
from llamagen_jax.weights.t5 import (
  FIELDS,
  load_t5,
  t5_from_torch,
  t5_to_torch,
)
from tests import parity, tiny

MODEL = parity.eval_manifest()["t5_tiny"]
CONFIG = T5Config(**{FIELDS[k]: v for k, v in MODEL["config"].items() if k in FIELDS})


@pytest.fixture(scope="module")
def tensors():
  found = parity.synthesize(MODEL["state_dict"])
  return found | {"encoder.embed_tokens.weight": found["shared.weight"]}


@pytest.fixture(scope="module")
def params(tensors):
  return t5_from_torch(CONFIG, tensors)


def test_golden(params):
  golden = parity.golden()
  mask = golden["t5_mask"] > 0
  found = encode(CONFIG, params, golden["t5_ids"], golden["t5_mask"])
  np.testing.assert_allclose(found[mask], golden["t5_out"][mask], atol=1e-4)


def test_bfloat16(params):
  golden = parity.golden()
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  found = encode(config, small, golden["t5_ids"], golden["t5_mask"])
  assert found.dtype == jnp.bfloat16
  mask = golden["t5_mask"] > 0
  found, expected = np.asarray(found, np.float32)[mask], golden["t5_out"][mask]
  lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
  assert np.min(np.sum(found * expected, axis=1) / lengths) > 0.998


def test_padding_changes_nothing(params):
  ids = np.random.default_rng(0).integers(2, 100, (3, 12)).astype(np.int32)
  mask = (np.arange(12) < np.array([[3], [12], [7]])).astype(np.int32)
  batch = encode(CONFIG, params, ids, mask)
  for row, length in enumerate((3, 12, 7)):
    alone = encode(CONFIG, params, ids[row : row + 1, :length], np.ones((1, length)))
    np.testing.assert_allclose(batch[row, :length], alone[0], atol=1e-5)
  noise = np.where(mask, ids, 5)
  other = encode(CONFIG, params, noise, mask)
  np.testing.assert_allclose(other[mask > 0], batch[mask > 0], atol=1e-6)


def test_left_pad():
  features = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
  found = left_pad(features, np.array([[1, 1, 0], [1, 1, 1]]))
  np.testing.assert_array_equal(found[0], [[0, 0], [1, 2], [3, 4]])
  np.testing.assert_array_equal(found[1], features[1])
  assert not left_pad(features, np.zeros((2, 3))).any()


def test_tensors_survive_both_ways(tensors, params):
  back = t5_to_torch(CONFIG, params)
  assert back.keys() == tensors.keys() - {"encoder.embed_tokens.weight"}
  for name, value in back.items():
    np.testing.assert_array_equal(value, tensors[name])


def test_folder(tmp_path, tensors, params):
  """Sharded safetensors with a decoder among them, a single file, bfloat16."""
  decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((2, 2), "f4")}
  whole = tensors | decoder | {"lm_head.weight": np.ones((2, 2), np.float32)}
  folder = tiny.write_t5(tmp_path / "sharded", CONFIG, params)
  (folder / "model.safetensors").unlink()
  tiny.write_sharded(folder, whole, files=3)
  encoder = load_t5(folder, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, encoder.params, params)
  assert encoder.config == CONFIG

  small = load_t5(folder, dtype="bfloat16")
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(small.params)} == {"bfloat16"}
  assert small.identity == encoder.identity
  single = tiny.write_t5(tmp_path / "single", CONFIG, params)
  assert load_t5(single, dtype="float32").identity == encoder.identity
  changed = jax.tree.map(lambda x: x * 1.5, params)
  other = tiny.write_t5(tmp_path / "other", CONFIG, changed)
  assert load_t5(other, dtype="float32").identity != encoder.identity


def test_folders_that_do_not_fit(tmp_path, params, tensors):
  folder = tiny.write_t5(tmp_path / "t5", CONFIG, params)
  fields = json.loads((folder / "config.json").read_text())

  def refused(*words):
    with pytest.raises(UserError) as error:
      load_t5(folder, dtype="float32")
    assert all(word in str(error.value) for word in words), error.value

  (folder / "config.json").write_text(json.dumps(fields | {"num_layers": 4}))
  refused("missing encoder.block.3")
  (folder / "config.json").write_text(json.dumps(fields | {"num_layers": 2}))
  refused("unexpected encoder.block.2")
  (folder / "config.json").write_text(json.dumps(fields | {"d_ff": 40}))
  refused("wi_0", "(48, 32)", "(40, 32)")
  (folder / "config.json").write_text(
    json.dumps(fields | {"feed_forward_proj": "relu"})
  )
  refused("config.json", "'relu'", "gated-gelu")
  (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": 20}))
  refused("tokens, the model 20")
  (folder / "config.json").write_text(json.dumps(fields))
  whole = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(whole[:-100])
  refused("model.safetensors", "not a whole")
  (folder / "model.safetensors").unlink()
  refused("no weights", "pytorch_model.bin")
  tiny.write_sharded(folder, tensors, files=2)
  next(folder.glob("model-*")).unlink()
  refused("index.json lists", "not there")
  (folder / "spiece.model").unlink()
  refused("no tokenizer")
  (folder / "config.json").unlink()
  refused("no config.json")


@pytest.mark.extra
def test_a_folder_in_a_bucket(tmp_path, bucket, params):
  folder = tiny.write_t5(tmp_path / "t5", CONFIG, params)
  for file in folder.iterdir():
    (bucket / "t5" / file.name).write_bytes(file.read_bytes())
  found = load_t5(str(bucket / "t5"), dtype="float32")
  assert found.identity == load_t5(folder, dtype="float32").identity
  with pytest.raises(UserError, match="no config.json"):
    load_t5(str(bucket / "other"), dtype="float32")


@pytest.mark.extra
def test_torch_pickle_and_bfloat16_files(tmp_path, params, tensors):
  torch = pytest.importorskip("torch")
  folder = tiny.write_t5(tmp_path / "t5", CONFIG, params)
  expected = load_t5(folder, dtype="float32")
  (folder / "model.safetensors").unlink()
  as_torch = {n: torch.from_numpy(v) for n, v in tensors.items()}
  torch.save(as_torch, folder / "pytorch_model.bin")
  assert load_t5(folder, dtype="float32").identity == expected.identity
  torch.save({n: t.bfloat16() for n, t in as_torch.items()}, folder / "x.bin")
  (folder / "x.bin").rename(folder / "pytorch_model.bin")
  assert load_t5(folder, dtype="bfloat16").identity == expected.identity
  (folder / "pytorch_model.bin").write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"pytorch_model.bin: no PyTorch checkpoint"):
    load_t5(folder, dtype="float32")
  torch.save(
    as_torch, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
  )
  assert load_t5(folder, dtype="float32").identity == expected.identity


@pytest.mark.extra
@pytest.mark.parametrize("tokens", [40, 120, 300])
def test_transformers(tokens):
  """Heads whose widths do not add up to the model's, and every bucket."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = T5Config(60, 24, layers=2, heads=3, head_dim=16, ffn_dim=40)
  theirs = transformers.T5Config(
    **{k: getattr(config, v) for k, v in FIELDS.items()},
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
  )
  torch.manual_seed(0)
  model = transformers.T5EncoderModel(theirs).eval()
  bias = model.encoder.block[0].layer[0].SelfAttention
  position = torch.arange(tokens)
  buckets = bias._relative_position_bucket(position[None, :] - position[:, None])
  np.testing.assert_array_equal(relative_buckets(config, tokens), buckets.numpy())
  params = t5_from_torch(config, {n: v.numpy() for n, v in model.state_dict().items()})
  ids = np.random.default_rng(0).integers(2, 60, (2, tokens))
  mask = (np.arange(tokens) < np.array([[tokens // 2], [tokens]])).astype(np.int32)
  with torch.no_grad():
    expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
  found = encode(config, params, ids, mask)
  np.testing.assert_allclose(found[mask > 0], expected.numpy()[mask > 0], atol=1e-4)
