"""Two hosts that are killed, told to stop, and whose storage fails, at random.

LLAMAGEN_CHAOS_MINUTES makes each run longer than its four rounds.
"""

import collections
import os
import random
import re
import signal
import time

from etils import epath
import jax
import numpy as np
import pytest

from llamagen_jax.storage import in_bucket
from llamagen_jax.weights import bundle
from tests import gcs, tiny, unreliable
from tests.parallel.runs import command, finish, losses, start
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

MINUTES = float(os.environ.get("LLAMAGEN_CHAOS_MINUTES", 0))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FULL = "full disk"
LARGEST_FILE = 4000  # bytes that a file may have on a full disk
REFUSED, CUT = 0.03, 0.03  # shares of a bucket's requests


@pytest.fixture
def folder(tmp_path):
  tiny.write_codes(tmp_path / "train", records=160)
  tiny.write_codes(tmp_path / "val", records=8)
  return tmp_path


def pair(folder, workdir, steps, environment=None, **spec):
  """Starts a run on two hosts."""
  words, port = command(folder, workdir.name, steps, save_every=2), free_port()
  words.append(f"--workdir={workdir}")
  return [
    start([words], hosts=2, host=i, port=port, environment=environment, **spec)
    for i in range(2)
  ]


def chaos(folder, workdir, faults, environment=None) -> list[str]:
  """Starts the run again and again, until the time is over; returns the outputs."""
  rng, outputs, done = random.Random(os.urandom(4)), [], collections.Counter()
  deadline = time.monotonic() + 60 * MINUTES
  while sum(done.values()) < 4 or time.monotonic() < deadline:
    fault = rng.choice(faults) if MINUTES else faults[sum(done.values()) % len(faults)]
    limit = {"largest_file": LARGEST_FILE} if fault == FULL else {}
    processes = pair(folder, workdir, 10**6, environment, delay=0.1, **limit)
    if fault != FULL:
      wait_for_steps(workdir, rng.randrange(1, 4), processes)
      time.sleep(rng.uniform(0, 1))  # anywhere between two steps or in a save
      rng.choice(processes).send_signal(fault)
    ended = [process.communicate(timeout=600)[0] for process in processes]
    if fault == FULL:
      # TensorStore prints tracebacks of its callbacks, which only end with the process.
      ended = [output.splitlines()[-1] for output in ended]
      assert all(re.match("llamagen( train-gpt)?: ", line) for line in ended), ended
    outputs += ended
    done[fault] += 1
  print(dict(done))
  return outputs


def saved_step(workdir) -> int:
  paths = epath.Path(workdir / "checkpoints").glob("step_*")
  found = [re.fullmatch(r"step_(\d+)", path.name) for path in paths]
  return max((int(match[1]) for match in found if match), default=0)


def wait_for_steps(workdir, steps, processes) -> None:
  """Waits until a run has saved so many more steps, or has ended."""
  goal = saved_step(workdir) + steps
  while saved_step(workdir) < goal and processes[0].poll() is None:
    time.sleep(0.5)


def check(folder, workdir, outputs, environment=None) -> None:
  """Finishes the run, and one that nobody disturbed; both are equal."""
  steps = saved_step(workdir) + 2
  outputs += finished(folder, workdir, steps, environment)
  outputs += [finish(process) for process in pair(folder, folder / "calm", steps)]
  assert losses(workdir) == losses(folder / "calm")
  weights = [
    bundle.load_gpt(path / "bundle").params for path in (workdir, folder / "calm")
  ]
  jax.tree.map(np.testing.assert_array_equal, *weights)
  assert not [output for output in outputs if "Traceback" in output]
  files = gcs.names(workdir) if in_bucket(workdir) else map(str, workdir.rglob("*"))
  stray = [n for n in files if n.endswith(".part") or "orbax-checkpoint-tmp" in n]
  assert not stray


def finished(folder, workdir, steps, environment) -> list[str]:
  """Starts a run until it ends with 0; returns the outputs.

  A save that a storage refuses for good ends the run with 1 and a line, and the same
  command goes on: gcsfs sends the last part of an upload again when its answer was cut,
  and the emulator, which has the whole file by then, answers 404.
  """
  outputs = []
  while True:
    processes = pair(folder, workdir, steps, environment)
    outputs += [process.communicate(timeout=600)[0] for process in processes]
    codes = {process.returncode for process in processes}
    if codes == {0}:
      return outputs
    assert codes == {1} and environment and len(outputs) < 20, outputs[-1][-4000:]


def test_a_folder_on_a_disk_that_is_full_at_times(folder):
  outputs = chaos(folder, folder / "run", (*SIGNALS, FULL))
  check(folder, folder / "run", outputs)


@pytest.mark.extra
def test_a_bucket_that_fails_at_times(folder, bucket, emulator):
  faults = unreliable.Faults(REFUSED, CUT)
  with unreliable.proxy(emulator, faults) as url:
    outputs = chaos(folder, bucket / "run", SIGNALS, gcs.environment(url))
    check(folder, bucket / "run", outputs, gcs.environment(url))
  print(faults.counts)
  assert faults.counts["refused"] and faults.counts["cut"]
