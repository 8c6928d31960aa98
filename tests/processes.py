"""A verb on two hosts: two processes of this machine, connected by jax.distributed."""

from collections.abc import Sequence
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def on_two_hosts(words: list[str], cwd: pathlib.Path = ROOT) -> list[str]:
  """Returns the output of each of the hosts; both have to succeed."""
  return finish(start_two_hosts([words, words], cwd))


def start_two_hosts(
  words: Sequence[list[str]], cwd: pathlib.Path = ROOT
) -> list[subprocess.Popen]:
  """Starts a verb on two hosts, with words of their own."""
  flags = [f"--coordinator=127.0.0.1:{free_port()}", "--hosts=2"]
  return [start([*words[i], *flags, f"--host={i}"], cwd) for i in range(2)]


def start(words: list[str], cwd: pathlib.Path = ROOT) -> subprocess.Popen:
  """Starts a verb."""
  python = [sys.executable, "-c", "from llamagen_jax.commands import cli; cli.main()"]
  return subprocess.Popen(
    [*python, *words], cwd=cwd, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], code: int = 0) -> list[str]:
  """Waits for all and returns their outputs; all have to end with the same code."""
  try:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == code, output[-4000:]
  return outputs


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
