"""Both trainers through the loop: resume, refusal, what is left in the folder."""

import functools
import json

from etils import epath
import jax
import numpy as np
import pytest

import llamagen_jax as lg
from llamagen_jax import UserError
from llamagen_jax.data.loader import Stream
from llamagen_jax.errors import RunFailed
from llamagen_jax.training import checkpoint_files
from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training import train_tokenizer as tokenizer_train
from llamagen_jax.training.checkpoint import Checkpoints
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.training.recipe import RunConfig
from tests import tiny

TRAINERS = {
  "gpt": (gpt_train, tiny.write_codes, tiny.gpt_config),
  "tokenizer": (
    tokenizer_train,
    tiny.write_images,
    functools.partial(tiny.tokenizer_config, disc_start=2),  # through all phases
  ),
}


# At the compiler's normal effort the tokenizer's steps take minutes to compile.
@pytest.fixture(
  params=[
    pytest.param("gpt", marks=pytest.mark.exact),
    pytest.param("tokenizer", marks=pytest.mark.slow),
  ]
)
def trainer(request, tmp_path):
  """(module, function from steps to its config)."""
  module, write, make_config = TRAINERS[request.param]
  data = write(tmp_path / "data")
  return module, lambda steps: make_config(data, steps)


@pytest.fixture
def drawn(monkeypatch):
  """Every batch that a stream gives out."""
  seen, batches = [], Stream.batches

  def recording(stream, mesh, start):
    for batch in batches(stream, mesh, start):
      seen.append(jax.tree.map(np.asarray, batch))
      yield batch

  monkeypatch.setattr(Stream, "batches", recording)
  return seen


def logged_losses(workdir):
  rows = read_rows(workdir / "metrics.jsonl")
  return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_six_steps_are_three_and_three_bit_for_bit(trainer, tmp_path, drawn):
  module, config = trainer
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  state = module.train(config(6), whole)
  assert len(drawn) == 6
  module.train(config(3), halves)
  assert len(drawn) == 9
  resumed = module.train(config(6), halves)
  assert len(drawn) == 12

  assert [step for step, _ in logged_losses(whole)] == [1, 2, 3, 4, 5, 6]
  assert logged_losses(halves) == logged_losses(whole)
  jax.tree.map(np.testing.assert_array_equal, drawn[:6], drawn[6:])
  jax.tree.map(np.testing.assert_array_equal, resumed, state)
  assert int(state.step) == 6
  pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
  assert any((a != b).any() for a, b in pairs)


def test_a_run_leaves_a_bundle_logs_and_a_curve(trainer, tmp_path):
  module, config = trainer
  workdir = tmp_path / "run"
  module.train(config(2), workdir)
  names = {p.name for p in workdir.iterdir()}
  assert {"bundle", "checkpoints", "config.json", "metrics.jsonl", "loss.png"} <= names
  assert not [name for name in names if name.endswith(".part")]
  row = read_rows(workdir / "metrics.jsonl")[0]
  assert {"loss", "grad_norm", "lr", "steps_per_second", "data_wait"} <= row.keys()
  load = lg.load_gpt if module is gpt_train else lg.load_tokenizer
  assert load(workdir / "bundle").config == (
    tiny.GPT if module is gpt_train else tiny.TOKENIZER
  )


def test_a_few_steps_are_traced(tmp_path):
  config = tiny.gpt_config(tiny.write_codes(tmp_path / "data"), 8)
  plain = gpt_train.train(config, tmp_path / "plain")
  traced = gpt_train.train(config, tmp_path / "traced", profile=2)
  assert list((tmp_path / "traced/profile").rglob("*.xplane.pb"))
  assert not (tmp_path / "plain/profile").exists()
  jax.tree.map(np.testing.assert_array_equal, traced, plain)


def test_a_run_that_ends_in_its_trace_writes_it(tmp_path):
  config = tiny.gpt_config(tiny.write_codes(tmp_path / "data"), 5)
  gpt_train.train(config, tmp_path / "run", profile=100)
  assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_workdir_of_another_config_is_refused(trainer, tmp_path):
  module, config = trainer
  workdir = tmp_path / "run"
  module.train(config(1), workdir)
  before = (workdir / "config.json").read_text()
  other = config(1)
  other.optimizer.ema = 0.5
  with pytest.raises(UserError, match="config.optimizer.ema=0.9, this one has 0.5"):
    module.train(other, workdir)
  assert (workdir / "config.json").read_text() == before


def test_a_loss_that_is_not_finite_ends_the_run(trainer, tmp_path):
  module, config = trainer
  workdir, bad = tmp_path / "run", config(4)
  bad.run.save_every = 1
  bad.optimizer.lr = 1e30
  bad.optimizer.warmup_steps = 2  # the first rate is 0
  with pytest.raises(RunFailed, match="at step .; last good checkpoint .*: step ."):
    module.train(bad, workdir)
  saved = sorted(p.name for p in (workdir / "checkpoints").iterdir())
  failed = read_rows(workdir / "metrics.jsonl")[-1]["step"] + 1
  assert saved[-1] <= f"step_{failed - 1:09d}"
  assert not (workdir / "bundle").exists()


def test_checkpoints_hold_state_position_and_config(tmp_path):
  run = RunConfig(**tiny.run_section(steps=9))
  state = {"w": np.arange(3.0), "step": np.int32(5)}
  with Checkpoints(tmp_path, run, {"model": {"dim": 3}}, tiny.recipe) as checkpoints:
    checkpoints.begin({"kind": "gpt"})
    checkpoints.save(state, 5, {"next_step": 5}, force=True)
  stored = tmp_path / "checkpoints" / "step_000000005"
  assert {"state", "position", "config", "model"} <= {p.name for p in stored.iterdir()}
  with Checkpoints(tmp_path, run, {"model": {"dim": 3}}, tiny.recipe) as checkpoints:
    found, position = checkpoints.restore(jax.tree.map(np.zeros_like, state))
  np.testing.assert_array_equal(found["w"], state["w"])
  assert position == {"next_step": 5}
  assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"dim": 3}}


def test_what_a_kill_left_of_a_save_is_removed(tmp_path):
  run, state = RunConfig(**tiny.run_section(steps=9)), {"w": np.arange(3.0)}
  left = tmp_path / "checkpoints" / "step_000000005.orbax-checkpoint-tmp"
  (left / "state").mkdir(parents=True)
  with Checkpoints(tmp_path, run, {}, tiny.recipe) as checkpoints:
    checkpoints.save(state, 7, {"next_step": 7}, force=True)
  assert [p.name for p in left.parent.iterdir()] == ["step_000000007"]


def test_an_unfinished_checkpoint_in_a_bucket_is_none(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_files, "in_bucket", lambda _: True)
  for step in (3, 5):
    (tmp_path / f"step_{step:09d}").mkdir()
  (tmp_path / "step_000000003/commit_success.txt").touch()
  assert checkpoint_files.saved_steps(epath.Path(tmp_path)) == [3]


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
  run = RunConfig(**tiny.run_section(steps=9))
  states = {step: {"w": np.arange(999.0) + step} for step in (5, 6)}
  with Checkpoints(tmp_path, run, {}, tiny.recipe) as checkpoints:
    for step, state in states.items():
      checkpoints.save(state, step, {"next_step": step}, force=True)
  newest = tmp_path / "checkpoints" / "step_000000006"
  file = max((newest / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
  content = bytearray(file.read_bytes())
  if damage == "truncated":
    file.write_bytes(content[: len(content) // 2])
  elif damage == "missing":
    file.unlink()
  else:
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
  with (
    caplog.at_level("WARNING"),
    Checkpoints(tmp_path, run, {}, tiny.recipe) as checkpoints,
  ):
    state, position = checkpoints.restore(jax.tree.map(np.zeros_like, states[5]))
    np.testing.assert_array_equal(state["w"], states[5]["w"])
    assert position == {"next_step": 5}
    assert "step_000000006 is damaged" in caplog.text
    checkpoints.save(states[6], 6, {"next_step": 6}, force=True)
  assert (newest.parent / "unreadable_step_000000006").is_dir()
  assert newest.is_dir()
