"""A verb on two hosts: two processes of this machine, connected by jax.distributed."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def on_two_hosts(words: list[str], cwd: pathlib.Path = ROOT) -> list[str]:
  """What each of the hosts printed; both have to succeed."""
  coordinator = f"--coordinator=127.0.0.1:{free_port()}"
  python = [sys.executable, "-c", "from llamagen_jax.commands import cli; cli.main()"]
  processes = [
    subprocess.Popen(
      [*python, *words, coordinator, "--hosts=2", f"--host={host}"], cwd=cwd,
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True,
    )
    for host in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-4000:]
  return outputs


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
