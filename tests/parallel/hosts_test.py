"""Several hosts; runs in processes of their own: kills, preemption, damage."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llamagen_jax.parallel import hosts as cluster
from llamagen_jax.training.metrics_log import read_rows
from tests import tiny
from tests.conftest import COMPILER_FLAGS
from tests.parallel.runs import (
  command,
  final_state,
  finish,
  losses,
  start,
  wait_for_rows,
)
from tests.processes import ROOT, free_port

MESHES = {
  "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (2, 1, 4), "mix": (2, 2, 2),
  "wide": (1, 1, 8),
}  # fmt: skip


@pytest.mark.parametrize(
  "environment, joins",
  [
    ({}, True),  # a TPU VM: JAX asks the metadata server
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "TPU_WORKER_HOSTNAMES": "a"}, True),
  ],
)
def test_a_lone_host_with_chips_looks_for_no_others(monkeypatch, environment, joins):
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)  # JAX sets the first where it finds no chip
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  calls = []
  monkeypatch.setattr(cluster, "on_tpu_vm", lambda: True)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **_: calls.append("joined"))
  cluster.initialize_distributed(cluster.HostOptions())
  assert calls == ["joined"] * joins


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  tiny.write_codes(folder / "train", records=160)
  tiny.write_codes(folder / "val", records=8)
  return folder


@pytest.fixture(scope="module")
def one_device(folder):
  record = folder / "one.json"
  finish(start([command(folder, "one")], record=str(record)))
  return losses(folder / "one"), json.loads(record.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_two_hosts_train_what_one_does(folder, one_device, name):
  expected, read_by_one = one_device
  port, run = free_port(), command(folder, f"two-{name}", mesh=MESHES[name])
  records = [folder / f"{name}{i}.json" for i in range(2)]
  processes = [
    start([run], 4, hosts=2, host=i, port=port, record=str(records[i]))
    for i in range(2)
  ]
  for process in processes:
    finish(process)
  assert len(expected) == 6
  np.testing.assert_allclose(losses(folder / f"two-{name}"), expected, atol=1e-4)

  # Every host read its half of every batch, and nothing of the other's; both read all
  # where `tensor` lies over both.
  first, second = (json.loads(record.read_text()) for record in records)
  if name == "wide":
    assert first["rows"] == second["rows"] == read_by_one["rows"]
    return
  assert not set(first["keys"]) & set(second["keys"])
  together = zip(first["rows"], second["rows"], read_by_one["rows"], strict=True)
  for top, bottom, whole in together:
    assert top + bottom == whole


def test_rows_of_hosts_make_the_whole_batch():
  """Where chips of a host are no neighbours, and where both hosts hold all rows."""
  port = free_port()
  flags = f"{COMPILER_FLAGS} --xla_force_host_platform_device_count=4"
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.parallel.rows", f"127.0.0.1:{port}", str(host)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for host in range(2)
  ]  # fmt: skip
  for process in processes:
    output = finish(process)
    assert re.findall(r"rows of .*: (\d+)\.", output) == ["8", "8", "16", "16"], output


@pytest.mark.slow
def test_a_run_goes_on_with_other_hosts_and_chips(folder, one_device):
  port = free_port()
  half = [command(folder, "moved", steps=3, mesh=(2, 2, 2))]
  for process in [start(half, 4, hosts=2, host=i, port=port) for i in range(2)]:
    finish(process)
  record = folder / "moved.json"
  finish(start([command(folder, "moved")], devices=4, record=str(record)))
  np.testing.assert_allclose(losses(folder / "moved"), one_device[0], atol=1e-4)
  assert json.loads(record.read_text())["rows"] == one_device[1]["rows"][3:]


@pytest.mark.slow
def test_five_kills_change_nothing(folder):
  steps, rng = 40, random.Random(os.urandom(4))
  finish(start([command(folder, "whole", steps)]))
  killed = command(folder, "killed", steps, save_every=2)
  path = folder / "killed" / "metrics.jsonl"
  for _ in range(5):
    before = len(read_rows(path))
    process = start([killed], delay=0.15)
    while len(read_rows(path)) < before + 1 and process.poll() is None:
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.6))
    assert process.poll() is None, finish(process)
    process.kill()
    finish(process, -signal.SIGKILL)
  assert len(losses(folder / "killed")) < steps
  finish(start([killed]))
  assert losses(folder / "killed") == losses(folder / "whole")
  states = [final_state(folder / name, steps) for name in ("killed", "whole")]
  for a, b in zip(*states, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_signal_saves_and_exits_with_75(folder, hosts, number):
  name, port = f"stop{hosts}-{number}", free_port()
  path = folder / name / "metrics.jsonl"
  words = command(folder, name, steps=200)
  processes = [
    start([words], 2, hosts=hosts, host=i, port=port, delay=0.1) for i in range(hosts)
  ]
  wait_for_rows(path, 2, processes)
  processes[-1].send_signal(number)  # one host is told, all of them stop
  outputs = [finish(process, 75) for process in processes]
  stopped = {int(re.search(r"stopped at step (\d+) and saved", o)[1]) for o in outputs}
  assert len(stopped) == 1
  assert all("resume with the same command" in output for output in outputs)
  step = stopped.pop()
  assert len(losses(folder / name)) == step < 200
  assert (folder / name / "checkpoints" / f"step_{step:09d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_a_host_that_fails_ends_the_other_with_its_reason(folder, broken):
  """One host lacks the held-out codes: both end, with one line and its exit code."""
  port, words = free_port(), command(folder, f"reason{broken}")
  missing = [*words, "--config.data.eval_codes=/nowhere"]
  processes = [
    start([missing if i == broken else words], hosts=2, host=i, port=port)
    for i in range(2)
  ]
  outputs = [finish(process, 2) for process in processes]
  assert re.search(r"llamagen train-gpt: .*nowhere", outputs[broken])
  assert re.search(rf"host {broken} failed: .*nowhere", outputs[1 - broken])
  assert not any("Traceback" in output for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other(folder, killed):
  name, port = f"dead{killed}", free_port()
  words = command(folder, name, steps=2000)
  processes = [start([words], hosts=2, host=i, port=port, delay=0.1) for i in range(2)]
  wait_for_rows(folder / name / "metrics.jsonl", 2, processes)
  processes[killed].kill()
  other = processes[1 - killed]
  other.communicate(timeout=240)  # less than the five minutes of a barrier
  assert other.returncode != 0
  processes[killed].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_a_host_that_cannot_save_ends_the_other(folder, full):
  """Its part of the checkpoint fails, while the other one waits in a barrier."""
  words, port = command(folder, f"full{full}", steps=200, save_every=2), free_port()
  processes = [
    start(
      [words],
      hosts=2,
      host=i,
      port=port,
      **({"largest_file": 4000} if i == full else {}),
    )
    for i in range(2)
  ]
  outputs = [finish(process, 1) for process in processes]
  assert re.search("checkpoint of step 2 in .* could not be saved", outputs[full])
  assert re.search(f"host {full} failed: checkpoint of step 2", outputs[1 - full])
