"""Resuming: what may change, what is refused, and what a stopped run leaves."""

import json
import os
import signal
import threading
import time

from absl import logging
import jax
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import cli
from llamagen_jax.data.loader import Stream
from llamagen_jax.errors import RunFailed, Stopped
from llamagen_jax.parallel.hosts import StopSignal
from llamagen_jax.training import checkpoint, train_gpt
from llamagen_jax.training.checkpoint import Checkpoints
from llamagen_jax.training.checkpoint_files import with_retries
from llamagen_jax.training.export import export_bundle, load_run
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.training.recipe import RunConfig
from llamagen_jax.weights import bundle
from tests import tiny


@pytest.fixture
def codes(tmp_path):
  return tiny.write_codes(tmp_path / "data")


@pytest.fixture
def log(caplog):
  before = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  yield caplog
  logging.set_verbosity(before)


def test_a_nan_update_is_not_saved_and_another_rate_goes_on(codes, tmp_path, log):
  """The update of step 2 overflows; a smaller rate and the guard take over."""
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 3)
  config.run.save_every = 1
  config.optimizer.update(lr=1e38, warmup_steps=0, weight_decay=1e5)
  with pytest.raises(RunFailed, match="norm is .* at step .; last good checkpoint"):
    train_gpt.train(config, workdir)
  for path in (workdir / "checkpoints").glob("step_*"):
    step, found = load_run(workdir, int(path.name[5:]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params)), step
  config.optimizer.lr = 1e-3
  config.guard = {"skip_nonfinite": True}
  if (workdir / "checkpoints/step_000000001").exists():
    with log.at_level("INFO"):
      train_gpt.train(config, workdir)
    assert "config.optimizer.lr: 1e+38 -> 0.001 from step 1 on" in log.text
  else:  # nothing was saved: the folder is free for any config
    config.optimizer.weight_decay = 0.0
    train_gpt.train(config, workdir)
  assert read_rows(workdir / "metrics.jsonl")[-2]["skipped"] == 0


def test_lr_clip_guard_and_logs_may_change_and_are_said(codes, tmp_path, log):
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 2)
  train_gpt.train(config, workdir)
  config.run.update(steps=4, log_every=2)
  config.optimizer.update(lr=0.02, clip=0.5)
  config.guard = {"skip_spike": 3.0}
  with log.at_level("INFO"):
    train_gpt.train(config, workdir)
  for line in (
    "resumed from step 2 of 4", "config.optimizer.lr: 0.01 -> 0.02 from step 2 on",
    "config.guard.skip_spike: 0.0 -> 3.0", "(optimizer) of step 2: 0.01 -> 0.02",
    "1 hosts, 1 devices", "parameters:",
  ):  # fmt: skip
    assert line in log.text
  assert json.loads((workdir / "config.json").read_text())["run"]["steps"] == 4


def test_a_field_that_a_workdir_does_not_have_has_its_default(codes, tmp_path):
  """As in workdirs that are older than the field."""
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 1)
  train_gpt.train(config, workdir)
  config.run.steps, config.objective = 2, {"z_loss": 0.0}
  train_gpt.train(config, workdir)
  config.objective.z_loss = 0.1
  with pytest.raises(UserError, match=r"z_loss=0.0, this one has 0.1: use another"):
    train_gpt.train(config, workdir)
  path = workdir / "config.json"
  path.write_text(path.read_text().replace('"z_loss"', '"gone"'))
  with pytest.raises(UserError, match=r"config.json: .*unknown field gone.*another"):
    train_gpt.train(config, workdir)


@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
def test_a_gpu_that_resumes_up_to_rounding_is_told_of(
  codes, tmp_path, log, monkeypatch, flags
):
  workdir = tmp_path / "run"
  train_gpt.train(tiny.gpt_config(codes, 1), workdir)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("XLA_FLAGS", flags)
  train_gpt.train(tiny.gpt_config(codes, 2), workdir)
  assert ("bit for bit with XLA_FLAGS=" in log.text) == (not flags)


def test_fewer_steps_than_are_saved_are_refused(codes, tmp_path):
  workdir = tmp_path / "run"
  train_gpt.train(tiny.gpt_config(codes, 3), workdir)
  with pytest.raises(UserError, match=r"run.steps=2: .* is of step 3; expected .*>= 3"):
    train_gpt.train(tiny.gpt_config(codes, 2), workdir)


def test_a_longer_cosine_says_how_the_rate_jumps(codes, tmp_path, log):
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 3)
  config.optimizer.schedule = "cosine"
  train_gpt.train(config, workdir)
  config.run.steps = 4
  with log.at_level("INFO"):
    train_gpt.train(config, workdir)
  assert "config.run.steps: 3 -> 4 from step 3 on" in log.text
  assert "(optimizer) of step 3: 0 -> 0.005" in log.text


def test_a_refused_config_leaves_the_folder_free(codes, tmp_path):
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 2)
  config.optimizer.update(schedule="cosine", warmup_steps=5)
  with pytest.raises(UserError, match="warmup_steps"):
    train_gpt.train(config, workdir)
  assert not (workdir / "config.json").exists()
  config.optimizer.warmup_steps = 1
  train_gpt.train(config, workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_saves_as_sigterm_does(codes, tmp_path, monkeypatch, number):
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 50)
  host_batches = Stream.host_batches

  def signalled(stream, *where):
    for index, batch in enumerate(host_batches(stream, *where)):
      if index == 2:
        os.kill(os.getpid(), number)
      yield batch

  monkeypatch.setattr(Stream, "host_batches", signalled)
  with pytest.raises(Stopped, match="stopped at step 3 and saved; resume with"):
    train_gpt.train(config, workdir)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert (workdir / "checkpoints/step_000000003").is_dir()
  # A bundle of what there is, and one that another run can start from.
  path, step = export_bundle(workdir)
  assert (step, bundle.load_gpt(path).tokenizer) == (3, "tiny")
  config.run.steps, config.init_from = 1, str(workdir)
  monkeypatch.undo()
  train_gpt.train(config, tmp_path / "other")


def test_an_evaluation_that_fails_leaves_a_checkpoint(codes, tmp_path, monkeypatch):
  def failing(*_):
    raise OSError("the disk is gone")

  monkeypatch.setattr(train_gpt.GPTEvaluation, "__call__", failing)
  with pytest.raises(OSError, match="the disk is gone"):
    train_gpt.train(tiny.gpt_config(codes, 2), tmp_path / "run")
  assert (tmp_path / "run/checkpoints/step_000000002").is_dir()


def test_data_that_fails_leaves_a_checkpoint_and_one_line(codes, tmp_path, monkeypatch):
  host_batches = Stream.host_batches

  def failing(stream, *where):
    for index, batch in enumerate(host_batches(stream, *where)):
      if index == 2:
        raise RuntimeError("worker 0\nwas killed")
      yield batch

  monkeypatch.setattr(Stream, "host_batches", failing)
  with pytest.raises(RunFailed, match="data of step 2 failed .*worker 0 was killed"):
    train_gpt.train(tiny.gpt_config(codes, 9), tmp_path / "run")
  assert (tmp_path / "run/checkpoints/step_000000002").is_dir()


def test_bundles_of_any_checkpoint(codes, tmp_path, capsys):
  """`ema` where one is kept, else the weights; a bundle of the end equals the run's."""
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 3)
  config.run.save_every = 1
  train_gpt.train(config, workdir)
  words = ["export-bundle", f"--workdir={workdir}", f"--out={tmp_path / 'b'}"]
  assert cli.run([*words, "--step=3"]) == 0
  last, found = bundle.load_gpt(workdir / "bundle"), bundle.load_gpt(tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, found.params, last.params)
  assert (found.config, found.sampling, found.class_names) == (
    last.config, last.sampling, last.class_names,
  )  # fmt: skip
  assert load_run(workdir)[0] == 3
  capsys.readouterr()
  assert cli.run([*words, "--step=1"]) == 2  # keep_last is 2
  assert "no checkpoint of step=1; saved: 2, 3" in capsys.readouterr().err


def test_storage_that_answers_later_is_asked_again(monkeypatch):
  monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds))
  answers, waits = [ValueError("UNAVAILABLE: 503"), ConnectionResetError(), 7], []

  def read():
    answer = answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  assert with_retries(read, "x") == 7
  assert waits == [1, 4]
  answers[:] = [ValueError("shape (500, 503)")]
  with pytest.raises(ValueError, match="shape"):
    with_retries(read, "x")


def test_a_checkpoint_that_cannot_be_read_now_keeps_its_name(tmp_path, monkeypatch):
  run = RunConfig(**tiny.run_section(steps=9))
  state = {"w": np.arange(9.0)}
  for step in (5, 6):
    with Checkpoints(tmp_path, run, {}, tiny.recipe) as checkpoints:
      checkpoints.save(state, step, {"next_step": step}, force=True)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  with Checkpoints(tmp_path, run, {}, tiny.recipe) as checkpoints:

    def unavailable(*args, **kwargs):
      raise ValueError("UNAVAILABLE: the server is busy")

    monkeypatch.setattr(checkpoints._manager, "restore", unavailable)
    with pytest.raises(RunFailed, match="step 6 .* cannot be read: UNAVAILABLE"):
      checkpoints.restore(state)
  names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert names == ["step_000000005", "step_000000006"]


def test_outside_of_the_main_thread_no_signal_is_caught():
  """Python sets handlers in the main thread only."""
  seen = []

  def enter():
    with StopSignal() as stop:
      seen.append(stop.should_stop(1))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert seen == [False]


def test_a_full_disk_is_one_line(codes, tmp_path, monkeypatch, capsys):
  """The checkpoint before stays, and the run goes on from it when there is room."""
  workdir, config = tmp_path / "run", tiny.gpt_config(codes, 3)
  config.run.save_every = 2
  usage, full = checkpoint.shutil.disk_usage, []

  def disk_usage(path):
    full.append(path)
    return usage(path)._replace(free=10**12 if len(full) == 1 else 1000)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    with pytest.raises(RunFailed, match="step 3 takes .* left; last good .*: step 2"):
      train_gpt.train(config, workdir)
  assert int(train_gpt.train(config, workdir).step) == 3
