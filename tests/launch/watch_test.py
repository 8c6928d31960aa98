"""watch.sh keeps a run going through preemptions and failures."""

import itertools
import os
import signal
import subprocess

import pytest

from tests.launch.cloud import (
  HANGS,
  LAUNCH,
  TPU,
  TYPE,
  calls,
  environment,
  launch,
  log,
  wait_for,
)

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


@pytest.mark.slow
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
