"""A folder for the fake gcloud, and a checkout to ship."""

import os
import pathlib
import shutil
import signal

import pytest

from tests.launch.cloud import LAUNCH, git


@pytest.fixture
def cloud(tmp_path):
  """A folder for the fake gcloud; ends whatever a test started in it."""
  yield tmp_path
  ours = f"FAKE_CLOUD={tmp_path}".encode()
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if ours in (folder / "environ").read_bytes().split(b"\0"):
        os.kill(int(folder.name), signal.SIGKILL)
    except OSError:  # it ended meanwhile, or is not ours
      continue


@pytest.fixture
def repository(tmp_path):
  """A small checkout with the launch scripts, all committed."""
  folder = tmp_path / "checkout"
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("colab"))
  (folder / "model.py").write_text("one = 1\n")
  (folder / ".gitignore").write_text("/data/\n")
  git(folder, "init", "-q")
  git(folder, "add", "-A")
  git(folder, "commit", "-qm", "All")
  return folder
