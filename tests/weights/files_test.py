"""Reading and writing weight files; the pickles need PyTorch."""

import argparse
import os
import sys
import types

import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.weights import pickles
from llamagen_jax.weights.files import read_weights, write_weights
from llamagen_jax.weights.tables import copy, read_table
from tests import parity, tiny


@pytest.fixture(scope="module")
def weights():
  return parity.state_dict("gpt_tiny_c2i")


def contents(torch, weights) -> dict:
  """Every kind of checkpoint there is, by the entry that holds the weights."""
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  other = {name: torch.zeros_like(value) for name, value in tensors.items()}
  parameter = torch.nn.Parameter(torch.ones(3, 2))
  optimizer = torch.optim.AdamW([parameter], lr=1e-4)
  parameter.sum().backward()
  optimizer.step()
  args = argparse.Namespace(gpt_model="GPT-L", betas=(0.9, 0.95), ema=None, nested=[{}])
  extra = {
    "optimizer": optimizer.state_dict(), "scaler": {}, "steps": 300_000, "args": args,
  }  # fmt: skip
  return {
    "": tensors,
    "model": {"model": tensors, **extra},
    "ema": {"model": other, "ema": tensors, **extra},
    "module": {"module": tensors, "lr_scheduler": None},
    "state_dict": {"epoch": 3, "state_dict": tensors, "args": args},
  }


@pytest.mark.extra
@pytest.mark.parametrize("key", ["", "model", "ema", "module", "state_dict"])
def test_every_kind_of_pickle(tmp_path, monkeypatch, weights, key):
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(pickles, "WINDOW", 10_000)  # the file is opened many times
  torch.save(contents(torch, weights)[key], tmp_path / "x.pt")
  found, found_key, _ = read_weights(tmp_path / "x.pt")
  assert found_key == key
  assert found.keys() == weights.keys()
  for name, value in weights.items():
    assert found[name].shape == value.shape
    np.testing.assert_array_equal(np.asarray(found[name]), value, strict=True)


@pytest.mark.extra
def test_another_entry_can_be_asked_for(tmp_path, weights):
  torch = pytest.importorskip("torch")
  torch.save(contents(torch, weights)["ema"], tmp_path / "x.pt")
  found, key, _ = read_weights(tmp_path / "x.pt", "model")
  assert key == "model"
  assert not np.asarray(found["norm.weight"]).any()
  with pytest.raises(UserError, match=r"under 'state_dict'.*model \(18\), ema \(18\)"):
    read_weights(tmp_path / "x.pt", "state_dict")


@pytest.mark.extra
@pytest.mark.parametrize(
  "prefix",
  ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.model.",
   "model._forward_module._orig_mod."],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_are_stripped(tmp_path, weights, prefix, suffix):
  pytest.importorskip("torch")
  file = tmp_path / f"x{suffix}"
  write_weights(file, {prefix + name: value for name, value in weights.items()})
  found = read_weights(file).tensors
  assert found.keys() == weights.keys()
  name = "layers.1.attention.wo.weight"
  np.testing.assert_array_equal(np.asarray(found[name]), weights[name])


def test_a_part_that_alone_was_compiled(tmp_path):
  file, values = tmp_path / "x.safetensors", np.zeros(2, np.float32)
  write_weights(file, {"encoder._orig_mod.a": values, "decoder.a": values})
  assert set(read_weights(file).tensors) == {"encoder.a", "decoder.a"}
  write_weights(file, {"_orig_mod.a": values, "a": values})
  with pytest.raises(UserError, match="with and without _orig_mod"):
    read_weights(file)


@pytest.mark.extra
@pytest.mark.parametrize("new", [True, False])
def test_a_checkpoint_of_lightning(tmp_path, monkeypatch, weights, new):
  """Callbacks and configs of libraries that are not installed lie beside."""
  torch = pytest.importorskip("torch")
  tensors = {f"model.{name}": torch.from_numpy(x) for name, x in weights.items()}
  tensors["loss.discriminator.weight"] = torch.zeros(3)
  name = "pytorch_lightning.callbacks.model_checkpoint"
  for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
  callback = type("ModelCheckpoint", (), {"__module__": name})
  sys.modules[name].ModelCheckpoint = callback
  saved = callback()
  saved.best = 3
  torch.save(
    {"epoch": 3, "state_dict": tensors, "callbacks": {callback: {"best": saved}}},
    tmp_path / "last.ckpt", _use_new_zipfile_serialization=new,
  )  # fmt: skip
  monkeypatch.undo()
  found, key, _ = read_weights(tmp_path / "last.ckpt")
  assert key == "state_dict" and found.keys() == weights.keys()


@pytest.mark.extra
def test_numbers_of_numpy_beside_the_weights(tmp_path, weights):
  torch = pytest.importorskip("torch")
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  beside = {
    "best": np.float64(1), "when": np.float32(2), "step": np.int64(3),
    "done": np.bool_(True), "losses": np.ones(3), "name": np.str_("x"),
  }  # fmt: skip
  torch.save({"model": tensors, **beside}, tmp_path / "x.pt")
  assert read_weights(tmp_path / "x.pt").tensors.keys() == weights.keys()
  torch.save(tensors | {"epoch": 3, "best": np.float64(1)}, tmp_path / "x.pt")
  assert read_weights(tmp_path / "x.pt").tensors.keys() == weights.keys()


@pytest.mark.extra
def test_the_entry_with_weights_is_taken_or_suggested(tmp_path, weights):
  torch = pytest.importorskip("torch")
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  cases = {
    "model": {"ema": {}, "model": tensors},
    "state_dict.model": {"state_dict": {"model": tensors}, "ema": {"decay": 0.99}},
  }
  for key, content in cases.items():
    torch.save(content, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").key == key
  torch.save({"nets": {"generator": tensors}, "step": 3}, tmp_path / "x.pt")
  with pytest.raises(UserError, match=r"nets\.generator \(18\); --key takes one"):
    read_weights(tmp_path / "x.pt")
  found, key, _ = read_weights(tmp_path / "x.pt", "nets.generator")
  assert key == "nets.generator" and found.keys() == weights.keys()


@pytest.mark.extra
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin"])
@pytest.mark.parametrize(
  "content, words",
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    (b'{"error": "no such file"}', "JSON text"),
    (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    (b"", "an empty file"),
  ],
)
def test_what_was_downloaded_instead_is_named(tmp_path, name, content, words):
  pytest.importorskip("torch")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=words) as error:
    read_weights(tmp_path / name)
  assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.extra
def test_archives_that_are_no_checkpoints(tmp_path):
  torch = pytest.importorskip("torch")
  np.savez(tmp_path / "x.pt.npz", a=np.zeros(2))
  (tmp_path / "x.pt.npz").rename(tmp_path / "x.pt")
  with pytest.raises(UserError, match=r"a zip archive of other files \(a\.npy"):
    read_weights(tmp_path / "x.pt")
  program = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2))
  torch.jit.save(program, tmp_path / "x.pt")
  with pytest.raises(UserError, match="a TorchScript program"):
    read_weights(tmp_path / "x.pt")


@pytest.mark.extra
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_eight_bit_weights_are_refused_by_name(tmp_path, suffix):
  torch = pytest.importorskip("torch")
  safetensors = pytest.importorskip("safetensors.torch")
  for dtype in (torch.float8_e4m3fn, torch.int8):
    tensors = {"norm.weight": torch.ones(4).to(dtype), "other": torch.ones(4)}
    file = tmp_path / f"x{suffix}"
    save = torch.save if suffix == ".pt" else safetensors.save_file
    save(tensors, file)
    table = [copy(("norm",), "norm.weight", (4,)), copy(("x",), "other", (4,))]
    with pytest.raises(UserError, match=r"norm\.weight is \w+, expected float32 or"):
      read_table(table, read_weights(file).tensors)


@pytest.mark.extra
def test_half_precision_safetensors(tmp_path, weights):
  torch = pytest.importorskip("torch")
  safetensors = pytest.importorskip("safetensors.torch")
  half = {k: torch.from_numpy(v).bfloat16() for k, v in weights.items()}
  safetensors.save_file(half, tmp_path / "x.safetensors")
  found = read_weights(tmp_path / "x.safetensors").tensors
  for name, value in half.items():
    np.testing.assert_array_equal(
      np.asarray(found[name], np.float32), value.float().numpy()
    )


def test_folders_and_indices(tmp_path, weights):
  tiny.write_sharded(tmp_path, weights, files=3)
  for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
    found = read_weights(path).tensors
    assert found.keys() == weights.keys()
  (tmp_path / "model.safetensors.index.json").write_text("[1]")
  with pytest.raises(UserError, match="no weight_map"):
    read_weights(tmp_path)


def test_a_value_that_is_not_finite_is_refused_by_name():
  weights = {"a": np.ones(3, np.float32), "b": np.array([1, np.nan, np.inf])}
  table = [copy(("a",), "a", (3,)), copy(("b",), "b", (3,))]
  with pytest.raises(UserError, match=r"b is broken: 2 of its 3 values are NaN"):
    read_table(table, weights)


@pytest.mark.extra
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_files_of_old_pytorch(tmp_path, weights, dtype):
  torch = pytest.importorskip("torch")
  half = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in weights.items()}
  for new in (True, False):
    torch.save(half, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = read_weights(tmp_path / "x.pt").tensors
    for name, value in half.items():
      expected = value.float().numpy()
      np.testing.assert_array_equal(np.asarray(found[name]), expected, strict=True)


class Malicious:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


@pytest.mark.extra
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, weights, new):
  torch = pytest.importorskip("torch")
  found = contents(torch, weights)["model"]
  found["callback"] = Malicious(tmp_path / "pwned")
  torch.save(found, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
  with pytest.raises(UserError) as error:
    read_weights(tmp_path / "x.pt")
  assert "mkdir" in str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "pwned").exists()
  # The file does what it is accused of.
  torch.load(tmp_path / "x.pt", weights_only=False)
  assert (tmp_path / "pwned").exists()


@pytest.mark.extra
@pytest.mark.parametrize(
  "content, words",
  [
    ([1, 2], "holds a list, expected a dict"),
    ({"epoch": 3}, "no state dict; its entries are epoch, and none holds tensors"),
    ({}, "it is empty"),
    ({"model": {"a": "b"}}, "no state dict; its entries are model, and none holds"),
  ],
)
def test_pickles_without_weights(tmp_path, content, words):
  torch = pytest.importorskip("torch")
  torch.save(content, tmp_path / "x.pt")
  with pytest.raises(UserError, match=words):
    read_weights(tmp_path / "x.pt")


@pytest.mark.extra
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize(
  "content", [b"", b"<html>404</html>", b"PK\x03\x04" + b"x" * 99]
)
def test_broken_files(tmp_path, name, content):
  pytest.importorskip("torch")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=f"{name}: no "):
    read_weights(tmp_path / name)


@pytest.mark.extra
def test_safetensors_without_torch(tmp_path, monkeypatch, weights):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  write_weights(tmp_path / "x.safetensors", weights)
  found, key, _ = read_weights(tmp_path / "x.safetensors")
  assert not key
  assert found.keys() == weights.keys()
  for name, value in weights.items():
    np.testing.assert_array_equal(np.asarray(found[name]), value, strict=True)
  with pytest.raises(UserError, match=r"llamagen_jax\[convert\]"):
    write_weights(tmp_path / "x.pt", weights)
  assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match=r"x\.pt: no such file"):
    read_weights(tmp_path / "x.pt")
