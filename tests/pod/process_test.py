"""A function in a process of its own: its result, its errors, its log."""

import io
import os
import signal
import time

from absl import logging
import pytest

from llamagen_jax.errors import RunFailed, UserError
from llamagen_jax.pod import process, topology
from llamagen_jax.pod.process import run_apart


def noisy(a: int, b: int) -> tuple[int, int]:
  os.write(2, b"pages about a TPU that is not there")
  logging.info("adding")
  logging.warning("axis %r is whole on every chip", "embed")
  return a + b, os.getpid()


def refused() -> None:
  raise UserError("mesh.data=3: expected 4")


def broken() -> None:
  raise KeyError("a bug")


def killed() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def slow(seconds: float) -> str:
  logging.info("waiting")
  time.sleep(seconds)
  return "done"


def test_a_result_comes_back_with_stages_and_warnings(capfd):
  news = io.StringIO()
  total, pid = run_apart(noisy, 2, 3, news=news)
  assert total == 5 and pid != os.getpid()
  stage, warning = news.getvalue().splitlines()
  assert stage.endswith(" s  adding")
  assert warning == "warning: axis 'embed' is whole on every chip"
  assert "pages" not in capfd.readouterr().err


@pytest.mark.parametrize(
  "function, error, words",
  [
    (refused, UserError, "mesh.data=3: expected 4"),
    (broken, RunFailed, "KeyError: 'a bug'"),
    (killed, RunFailed, "ended with code -9"),
  ],
)
def test_errors_come_back(function, error, words):
  with pytest.raises(error, match=words):
    run_apart(function, news=io.StringIO())


def test_a_long_stage_is_named_again_with_its_seconds(monkeypatch):
  monkeypatch.setattr(process, "NEWS_SECONDS", 0)
  news = io.StringIO()
  assert run_apart(slow, 3.5, news=news) == "done"
  assert "waiting, for " in news.getvalue()


def test_a_topology_is_parsed_without_a_compiler(monkeypatch):
  assert topology.parse("v5e:16x16x2") == topology.Topology("v5e", (16, 16), 2)
  assert topology.parse("v5p:2x2x4").devices == 16
  assert topology.parse("tpu7x:2x2x1x3").devices == 24
  for text in ("v9:2x2", "v5p:2x2", "v5e:2", "v5e:2x2x2x2", "v5e:0x2", "v5e"):
    with pytest.raises(UserError, match="expected such as v5e:2x4"):
      topology.parse(text)
