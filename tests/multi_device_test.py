"""Runs tests/multi_device in a process of its own, with eight fake devices."""

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent / "multi_device"


def test_on_eight_devices():
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-q",
      "-n0",
      "-o",
      "python_files=*_check.py",
      FOLDER,
    ],
    env=environment,
    cwd=FOLDER.parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
