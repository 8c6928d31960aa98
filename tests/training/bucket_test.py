"""A run whose workdir is in a bucket: the emulator of Google Cloud Storage."""

import jax
import numpy as np
import pytest

from llamagen_jax.data.loader import Stream
from llamagen_jax.errors import RunFailed
from llamagen_jax.training import train_gpt
from llamagen_jax.training.export import load_run
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.weights import bundle
from tests import tiny
from tests.gcs import names

pytestmark = pytest.mark.extra


def test_a_run_in_a_bucket_equals_a_local_one(bucket, tmp_path, monkeypatch):
  """It fails at step 3 and goes on; log, curve, events and bundle are there."""
  config = tiny.gpt_config(tiny.write_codes(tmp_path / "data"), 4)
  config.run.save_every = 2
  local = train_gpt.train(config, tmp_path / "run")
  host_batches = Stream.host_batches

  def failing(stream, *where):
    for index, batch in enumerate(host_batches(stream, *where)):
      if index == 3:
        raise RuntimeError("killed")
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(Stream, "host_batches", failing)
    with pytest.raises(RunFailed, match="killed"):
      train_gpt.train(config, bucket / "run")
  assert [row["step"] for row in read_rows(bucket / "run/metrics.jsonl")] == [1, 2, 3]
  state = train_gpt.train(config, bucket / "run")
  jax.tree.map(np.testing.assert_array_equal, state, local)

  losses = [
    [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl")
     if "loss" in row]
    for folder in (bucket / "run", tmp_path / "run")
  ]  # fmt: skip
  assert losses[0] == losses[1]
  assert len(losses[0]) == 4
  found = names(bucket / "run")
  for name in ("config.json", "loss.png", "bundle/config.json"):
    assert name in found
  assert len([name for name in found if name.startswith("events.")]) == 2
  assert not [name for name in found if name.endswith(".part")]
  jax.tree.map(
    np.testing.assert_array_equal, bundle.load_gpt(bucket / "run/bundle").params,
    load_run(bucket / "run")[1].params,
  )  # fmt: skip
  assert not list(tmp_path.glob("gs:*"))
