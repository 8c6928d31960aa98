import json
import os
import subprocess
import sys
import types

from PIL import Image
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.training.metrics_log import MetricsLog, read_rows
from llamagen_jax.training.recipe import RunConfig
from tests import tiny
from tests.processes import ROOT


def test_a_resumed_log_drops_the_steps_that_are_redone(tmp_path):
  log = MetricsLog(tmp_path, start=0)
  for step in range(1, 6):
    log.write(step, {"loss": 1 / step})
  log.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
  log = MetricsLog(tmp_path, start=3)
  log.write(4, {"loss": 0.5})
  log.write_curve(("loss", "never"))
  log.close()
  rows = read_rows(path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert rows[-1] == {"step": 4, "loss": 0.5}
  assert all(json.loads(line) for line in path.read_text().splitlines())
  with Image.open(tmp_path / "loss.png") as image:
    assert image.width > 200
  assert list(tmp_path.glob("events.*"))


@pytest.mark.extra
def test_flushed_rows_outlive_a_kill_where_nothing_can_be_appended(bucket):
  log = MetricsLog(bucket / "run", start=0)
  for step in (1, 2):
    log.write(step, {"loss": 1 / step})
  log.flush()
  log.write(3, {"loss": 0.2})
  assert [row["step"] for row in read_rows(bucket / "run/metrics.jsonl")] == [1, 2]


def test_a_log_does_not_import_torch(tmp_path):
  """It takes seconds, and tensorboardX does where it can."""
  (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
  code = f"""
import sys
from llamagen_jax.training.metrics_log import MetricsLog
log = MetricsLog({str(tmp_path)!r}, start=0)
log.write(1, {{"loss": 1.0}})
log.close()
assert "torch" not in sys.modules
"""
  environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
  subprocess.run([sys.executable, "-c", code], env=environment, check=True)
  assert list(tmp_path.glob("events.*"))


def test_a_tracker_gets_every_row(tmp_path, monkeypatch):
  calls = []
  tracker = types.SimpleNamespace(
    init=lambda **fields: calls.append(fields),
    log=lambda row, step: calls.append((step, row)),
    finish=lambda: calls.append("finished"),
  )
  monkeypatch.setitem(sys.modules, "trackio", tracker)
  (tmp_path / "run").mkdir()
  log = MetricsLog(tmp_path / "run", 0, "trackio")
  log.write(3, {"loss": 0.5})
  log.close()
  (begun, *rest) = calls
  assert begun["project"] == "llamagen_jax" and begun["name"].startswith("run-")
  assert rest == [(3, {"loss": 0.5}), "finished"]
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="'wandb' is not installed: pip install wandb"):
    MetricsLog(tmp_path, 0, "wandb")
  with pytest.raises(UserError, match="'x': expected none or wandb or trackio"):
    RunConfig(**tiny.run_section(1), tracker="x")


def test_a_tracker_knows_a_resumed_run(tmp_path, monkeypatch):
  """wandb by an id; a new run, here or elsewhere, is another one."""
  begun = []
  tracker = types.SimpleNamespace(
    init=lambda **fields: begun.append(fields), finish=lambda: None
  )
  monkeypatch.setitem(sys.modules, "wandb", tracker)
  for place, start in (("a/gpt", 0), ("a/gpt", 5), ("a/gpt", 0), ("b/gpt", 0)):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    MetricsLog(tmp_path / place, start, "wandb").close()
  ids = [fields["id"] for fields in begun]
  assert ids[0] == ids[1] and len(set(ids)) == 3
  assert all(id.startswith("gpt-") for id in ids)


@pytest.mark.parametrize("field", ["steps", "log_every", "save_every", "keep_last"])
def test_periods_have_to_be_positive(field):
  with pytest.raises(UserError, match=f"run.{field}=0: expected 1 or more"):
    RunConfig(**{**tiny.run_section(1), field: 0})
