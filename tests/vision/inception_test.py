"""Inception against the golden numbers, on synthesized weights."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from llamagen_jax.commands import cli
from llamagen_jax.errors import UserError
from llamagen_jax.vision.inception import extract_features
from llamagen_jax.weights import bundle
from llamagen_jax.weights.inception import inception_from_torch, load_inception
from tests import parity


@functools.cache
def state_dict():
  return parity.synthesize(parity.eval_manifest()["inception_2015"])


def close(found, expected):
  error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
  assert error < 1e-3, error


def test_features_equal_the_golden_ones():
  golden = parity.golden()
  found = extract_features(
    inception_from_torch(state_dict()), golden["inception_image"]
  )
  close(found.pool, golden["inception_pool"])
  close(found.spatial.reshape(-1, 17, 17, 7), golden["inception_spatial"])
  close(found.logits, golden["inception_logits_nobias"])


def test_import_is_strict():
  name = "Mixed_7c.branch_pool.bn.running_var"
  renamed = dict(state_dict())
  renamed["other"] = renamed.pop(name)
  with pytest.raises(UserError, match=rf"missing {name}.*unexpected other"):
    inception_from_torch(renamed)


def test_another_file_is_refused(tmp_path):
  save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors")
  with pytest.raises(UserError, match="expected pt_inception-2015-12-05"):
    load_inception(tmp_path / "x.safetensors")


def test_import_into_a_bundle(inception, tmp_path, capsys):
  command = ["import-weights", f"--file={inception}", f"--out={tmp_path / 'inception'}"]
  assert cli.run(command) == 0
  assert "Inception of 2015-12-05" in capsys.readouterr().out
  read, expected = (load_inception(p) for p in (tmp_path / "inception", inception))
  jax.tree.map(np.testing.assert_array_equal, read, expected)
  with pytest.raises(UserError, match="expected 'gpt'"):
    bundle.load_gpt(tmp_path / "inception")
