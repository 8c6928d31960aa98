import json

from PIL import Image

from llamagen_jax.training.metrics_log import MetricsLog, read_rows


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
