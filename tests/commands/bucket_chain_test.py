"""The chain of a pod with all its files in a bucket, as README's commands make it."""

import os
import signal
import time

from etils import epath
import pytest

from llamagen_jax.storage import read_json
from llamagen_jax.training.metrics_log import read_rows
from tests import tiny
from tests.gcs import names
from tests.processes import ROOT, finish, start, start_two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.extra]
STEPS = 8


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Empty folders, where a process might leave something behind."""
  for variable, name in (("HOME", "home"), ("TMPDIR", "temporary")):
    (tmp_path / name).mkdir()
    monkeypatch.setenv(variable, str(tmp_path / name))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  (tmp_path / "here").mkdir()
  return tmp_path


def left_behind(machine) -> list[str]:
  """Returns files outside of the cache; a killed process cannot remove its events."""
  folders = [machine / name for name in ("home", "temporary", "here")]
  files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
  found = [str(p.relative_to(machine)) for p in files]
  return [n for n in found if not n.startswith("home/.cache/") and "/events." not in n]


def configs(machine, bucket) -> tuple[os.PathLike, os.PathLike]:
  """Writes tiny recipes of a tokenizer and of a transformer of its codes."""
  tokenizer = tiny.tokenizer_config(tiny.write_images(machine / "images", 24), 2)
  gpt = tiny.gpt_config(bucket / "codes", STEPS)
  gpt.model.update(grid=8, vocab_size=16, num_classes=2)
  gpt.run.save_every = 2
  paths = machine / "vq.py", machine / "gpt.py"
  for path, config in zip(paths, (tokenizer, gpt), strict=True):
    tiny.write_config(path, config)
  return paths


def test_codes_train_kill_resume_sample_evaluate(machine, bucket, inception):
  vq, gpt = configs(machine, bucket)
  here = machine / "here"

  def one(verb, **flags):
    finish([start([verb, *words(flags)], here)])

  def two(verb, **flags):
    finish(start_two_hosts([[verb, *words(flags)]] * 2, here))

  one("train-tokenizer", config=vq, workdir=bucket / "vq")
  two(
    "extract-codes", tokenizer=bucket / "vq/bundle", out=bucket / "codes",
    source=f"folder:{machine / 'images'}", image_size=16, shards=4, batch_size=4,
  )  # fmt: skip
  training = {"config": gpt, "workdir": bucket / "run"}
  killed = start_two_hosts([["train-gpt", *words(training)]] * 2, here)
  while not any(p.name == "step_000000002" for p in saved(bucket)):
    assert all(process.poll() is None for process in killed), finish(killed)
    time.sleep(0.2)
  for process in killed:
    process.kill()
  finish(killed, -signal.SIGKILL)
  one("train-gpt", **training)
  rows = [row["step"] for row in read_rows(bucket / "run/metrics.jsonl")]
  assert sorted(set(rows)) == list(range(1, STEPS + 1))

  sampling = {"tokenizer": bucket / "vq/bundle", "fid_batch": 6, "batch_size": 2}
  two("sample", workdir=bucket / "run", out=bucket / "samples.npz", **sampling)
  one(
    "evaluate", protocol="custom", inception=inception, samples=bucket / "samples.npz",
    reference=machine / "images", out=bucket / "scores.json",
    cache=bucket / "features",
  )  # fmt: skip
  assert read_json(bucket / "scores.json")["samples"]["count"] == 6
  found = names(bucket)
  assert {"codes/manifest.json", "run/loss.png", "run/bundle/config.json"} <= {*found}
  assert not [name for name in found if name.endswith(".part") or "tmp" in name]
  assert not left_behind(machine)


def words(flags) -> list[str]:
  return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def saved(bucket) -> list[epath.Path]:
  folder = bucket / "run/checkpoints"
  return list(folder.iterdir()) if folder.exists() else []
