"""A verb starts anew with large pages, and is otherwise the process it was."""

import os
import subprocess
import sys

import pytest

SHOW = """
import os, sys
from llamagen_jax.runtime import ask_for_large_pages
ask_for_large_pages()
print(os.getpid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"])
sys.exit(3)
"""
LARGE = "glibc.malloc.hugetlb=1"


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
@pytest.mark.parametrize("before, after", [
  (None, LARGE), ("glibc.malloc.perturb=0", f"glibc.malloc.perturb=0:{LARGE}"),
  ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
])  # fmt: skip
def test_starts_anew_once(before, after):
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  if before is not None:
    environment["GLIBC_TUNABLES"] = before
  process = subprocess.Popen(
    [sys.executable, "-c", SHOW, "a b", "--c"], env=environment,
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  output = process.communicate()[0]
  assert output == f"{process.pid} ['a b', '--c'] {after}\n"
  assert process.returncode == 3
