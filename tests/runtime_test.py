"""The process of a verb: large pages, steady sums and a cache of programs."""

import os
import subprocess
import sys

import pytest

from llamagen_jax import runtime

SHOW = """
import os, sys
from llamagen_jax.runtime import prepare
prepare()
print(os.getpid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"])
sys.exit(3)
"""
LARGE = "glibc.malloc.hugetlb=1"
COMPILE = """
from llamagen_jax.runtime import prepare
prepare()
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


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


def test_programs_are_kept_where_the_user_says(tmp_path):
  found = runtime.compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
  folder = found["JAX_COMPILATION_CACHE_DIR"]
  assert folder.startswith(f"{tmp_path}/llamagen_jax/programs/")
  assert 0 < int(found["JAX_COMPILATION_CACHE_MAX_SIZE"]) <= 2**33
  mine = {"JAX_COMPILATION_CACHE_DIR": "/mine"}
  assert "JAX_COMPILATION_CACHE_DIR" not in runtime.compilation_cache(mine)


@pytest.mark.parametrize("switch, kept", [("1", True), ("0", False)])
def test_a_verb_leaves_its_programs_in_the_cache(tmp_path, switch, kept):
  environment = {
    name: value for name, value in os.environ.items()
    if not name.startswith("JAX_")
  } | {  # fmt: skip
    "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": switch,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }  # fmt: skip
  subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
  assert bool([*tmp_path.rglob("*-cache")]) == kept


def test_steady_sums_keep_other_flags_and_are_set_once(monkeypatch):
  monkeypatch.setattr(runtime, "_has_tpu", lambda: False)
  monkeypatch.setattr(runtime, "STEADY_SUMS_JAX", "")  # any version
  first = runtime.steady_sums({"XLA_FLAGS": "--a=1"})
  assert first["XLA_FLAGS"] == f"--a=1 {runtime.STEADY_SUMS}"
  assert int(first["NPROC"]) >= runtime.LEAST_THREADS
  assert runtime.steady_sums(first) == {}
  assert runtime.steady_sums({"NPROC": "3"})["NPROC"] == "3"


def test_flags_that_xla_may_not_know_are_left_out(monkeypatch):
  monkeypatch.setattr(runtime, "_has_tpu", lambda: True)
  assert runtime.steady_sums({}) == {}
  monkeypatch.setattr(runtime, "_has_tpu", lambda: False)
  monkeypatch.setattr(runtime, "STEADY_SUMS_JAX", "0.0.")
  assert runtime.steady_sums({}) == {}
