"""A cloud for launch scripts: a gcloud that notes its calls, and folders for TPUs."""

import json
import os
import pathlib
import subprocess
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
VERBS = ("create", "setup", "run", "watch", "tail", "delete")
TPU = ["--name", "pod", "--zone", "us-east5-a"]
TYPE = ["--type", "v5litepod-16"]
HANGS = 900  # seconds; far beyond the slowest machine, so that no test races it


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


def git(folder, *words):
  names = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")
  author = {f"GIT_{name}": "tests@example.com" for name in names}
  subprocess.run(["git", *words], cwd=folder, check=True, env=os.environ | author)
