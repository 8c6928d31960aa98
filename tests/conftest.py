"""Set before JAX is imported: the suite's time is mostly compilation.

Programs are compiled with little effort, and once for all tests. Most are of a single
operation, and even those are read from the cache sooner (22 tests of the transformer:
72 s in place of 88). LLAMAGEN_TESTS_OPTIMIZE=1 compiles as users do; `.ci/run` runs the
tests marked `exact`, which compare bits of several programs, in this way, too.
"""

from importlib import metadata
import os
import pathlib
import signal
import tempfile

import pytest

from tests.gcs import bucket, emulator  # noqa: F401, fixtures of all tests

CACHE = pathlib.Path(tempfile.gettempdir()) / f"llamagen_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

COMPILER_FLAGS = ""
KNOWN = metadata.version("jaxlib").startswith("0.10.")  # others may not know a flag
if KNOWN:
  # One LLVM module a program in place of up to 32: 14 % less CPU time.
  COMPILER_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if not os.environ.get("LLAMAGEN_TESTS_OPTIMIZE"):
  COMPILER_FLAGS += " --xla_backend_optimization_level=0"
  if KNOWN:
    # Without these emitters a train step compiles in less than half the time (two
    # programs of a tiny model: 14.1 -> 6.6 s, jaxlib 0.10.2).
    COMPILER_FLAGS += " --xla_cpu_use_fusion_emitters=false"
if COMPILER_FLAGS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + COMPILER_FLAGS

# A shell that starts the tests in the background lets them ignore Ctrl-C, and with them
# every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
  """Forgets compiled programs after a file of tests.

  Linux allows a process 65 530 mappings of memory. Programs of the whole suite take
  more, and then XLA ends with a segmentation fault (jaxlib 0.10.2).
  """
  yield
  import jax  # noqa: PLC0415, after the variables above

  jax.clear_caches()
