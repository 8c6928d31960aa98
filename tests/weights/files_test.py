"""Reading and writing weight files; the pickles need PyTorch."""

import argparse
import os

import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.weights import files
from llamagen_jax.weights.files import read_weights, write_weights
from tests import parity


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
  monkeypatch.setattr(files, "WINDOW", 10_000)  # the file is opened many times
  torch.save(contents(torch, weights)[key], tmp_path / "x.pt")
  found, found_key = read_weights(tmp_path / "x.pt")
  assert found_key == key
  assert found.keys() == weights.keys()
  for name, value in weights.items():
    assert found[name].shape == value.shape
    np.testing.assert_array_equal(np.asarray(found[name]), value, strict=True)


@pytest.mark.extra
def test_another_entry_can_be_asked_for(tmp_path, weights):
  torch = pytest.importorskip("torch")
  torch.save(contents(torch, weights)["ema"], tmp_path / "x.pt")
  found, key = read_weights(tmp_path / "x.pt", "model")
  assert key == "model"
  assert not np.asarray(found["norm.weight"]).any()
  with pytest.raises(UserError, match="under 'state_dict'.*model, ema, optimizer"):
    read_weights(tmp_path / "x.pt", "state_dict")


@pytest.mark.extra
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_files_of_old_pytorch(tmp_path, weights, dtype):
  torch = pytest.importorskip("torch")
  half = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in weights.items()}
  for new in (True, False):
    torch.save(half, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found, _ = read_weights(tmp_path / "x.pt")
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
    ({"epoch": 3}, "no state dict, 'epoch' is no tensor"),
    ({}, "it is empty"),
    ({"model": {"a": "b"}}, "'a' is no tensor"),
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
  pytest.importorskip("safetensors")
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  write_weights(tmp_path / "x.safetensors", weights)
  found, key = read_weights(tmp_path / "x.safetensors")
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
