"""What a clone holds: no large files, one version, no leftovers of a machine."""

import pathlib
import re
import subprocess

import pytest

import llamagen_jax
from tests import large_files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
  listed = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if listed.returncode:
    pytest.skip("not a git checkout")
  return listed.stdout.split("\n")[:-1]


def test_no_large_file_is_tracked(tracked):
  assert large_files.problems([str(ROOT / name) for name in tracked]) == []


def test_a_large_file_and_an_archive_are_refused(tmp_path):
  (tmp_path / "weights.bin").write_bytes(bytes(large_files.LIMIT + 1))
  (tmp_path / "jax.tar.gz").write_bytes(b"")
  lines = large_files.problems([*map(str, tmp_path.iterdir())])
  assert len(lines) == 2 and "600001 bytes" in "".join(lines)


def test_the_changelog_names_this_version():
  changelog = (ROOT / "CHANGELOG.md").read_text()
  versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
  assert versions[0] == llamagen_jax.__version__
