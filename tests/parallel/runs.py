"""Runs of a tiny transformer on one host or several, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp

from llamagen_jax.training.metrics_log import read_rows
from tests import tiny
from tests.conftest import COMPILER_FLAGS

CHILD = pathlib.Path(__file__).with_name("child.py")


def command(folder, workdir, steps=6, mesh=(-1, 1, 1), save_every=100) -> list[str]:
  """Writes a config into a folder with train/ and val/, and returns the command."""
  config = tiny.gpt_config(folder / "train", steps)
  config.data.eval_codes = str(folder / "val")
  config.run.save_every = save_every
  config.mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
  path = folder / f"{workdir}-{steps}-{'-'.join(map(str, mesh))}.py"
  tiny.write_config(path, config)
  return ["train-gpt", f"--config={path}", f"--workdir={folder / workdir}"]


def start(
  commands, devices=1, hosts=1, host=0, port=0, environment=None, **spec
) -> subprocess.Popen:
  """Starts a child with commands; `spec` is described there."""
  if hosts > 1:
    flags = [f"--coordinator=127.0.0.1:{port}", f"--hosts={hosts}", f"--host={host}"]
    commands = [[*words, *flags] for words in commands]
  return subprocess.Popen(
    [sys.executable, CHILD, json.dumps({"commands": commands, **spec})],
    env=os.environ
    | {
      "XLA_FLAGS": f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={devices}",
      "JAX_PLATFORMS": "cpu",
    }
    | (environment or {}),
    cwd=CHILD.parents[2],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, code=0) -> str:
  try:
    output, _ = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == code, output[-4000:]
  return output


def losses(workdir) -> list[float]:
  rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
  return [row["loss"] for row in rows]


def final_state(workdir, step):
  path = (workdir / "checkpoints" / f"step_{step:09d}" / "state").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(path))


def wait_for_rows(path, count, processes):
  while len(read_rows(path)) < count and processes[0].poll() is None:
    time.sleep(0.1)
