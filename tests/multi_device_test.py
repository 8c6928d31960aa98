"""Runs the checks of tests/multi_device in processes with eight fake devices."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "multi_device"
SLOW = ("evaluation_check.py", "recipes_check.py", "serving_check.py")
CHECKS = [
  pytest.param(path, marks=[pytest.mark.slow] * (path.name in SLOW), id=path.stem)
  for path in sorted(FOLDER.glob("*_check.py"))
]


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
  }
  options = ["-q", "-n0", "-o", "python_files=*_check.py"]
  done = subprocess.run(
    [sys.executable, "-m", "pytest", *options, check],
    env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
