"""The set-up of a verb's process, made in one place before JAX starts.

Everything here is an environment variable: a value that the user has set stays.
"""

import hashlib
from importlib import metadata
import os
import pathlib
import platform
import sys

LARGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb")
CACHE = "JAX_COMPILATION_CACHE_DIR"
CACHE_BYTES = 4 * 2**30  # the programs not used for longest are deleted above it
LEAST_SECONDS = "0.3"  # programs that compile faster are not kept
STEADY_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
STEADY_SUMS_JAX = "0.10."  # versions whose XLA knows the flag; others would not start
LEAST_THREADS = 8


def prepare(*, steady: bool = False) -> None:
  """Sets up this process: the compilation cache, large pages, XLA's flags.

  To be called first of all. On Linux the process may begin again, because glibc reads
  its variable before a program runs.

  Args:
    steady: images have to be the same whatever the number of devices, and in every
      command: `steady_sums`.
  """
  os.environ.update(compilation_cache(os.environ))
  if steady:
    os.environ.update(steady_sums(os.environ))
  pages = large_pages(os.environ)
  if sys.platform == "linux" and pages:
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, os.environ | pages)


def large_pages(environment: dict[str, str]) -> dict[str, str]:
  """Returns the variable with which glibc asks Linux for large pages.

  With pages of 4 kB a CPU spends a sixth of a train step on finding them.
  """
  variable, setting = LARGE_PAGES
  settings = environment.get(variable, "")
  if setting in settings:
    return {}
  return {variable: ":".join(filter(None, (settings, f"{setting}=1")))}


def compilation_cache(environment: dict[str, str]) -> dict[str, str]:
  """Returns the variables that keep compiled programs in a folder of bounded size.

  The folder is ~/.cache/llamagen_jax/programs, below XDG_CACHE_HOME if that is set.
  JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
  Each kind of CPU has a folder of its own: XLA's key does not name the instructions
  that a program was compiled for, and a home folder may be shared.
  """
  base = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  defaults = {
    CACHE: str(pathlib.Path(base) / "llamagen_jax" / "programs" / _cpu()),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(CACHE_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": LEAST_SECONDS,
  }
  return {name: value for name, value in defaults.items() if name not in environment}


def steady_sums(environment: dict[str, str]) -> dict[str, str]:
  """Returns variables that make sums on CPU independent of the number of threads.

  XLA's library for reductions splits them by threads, which shows in the last bits of
  an image: `sample` and `serve`, or one and four devices, would disagree. XLA takes a
  thread a device or, if more, NPROC; how it cuts a loop for them decides which numbers
  the vector unit rounds. Eight threads serve up to eight fake devices alike.

  Only commands that generate images have them: a train step of the digits' tokenizer
  takes 110 ms of CPU without and 190 ms with them (XLA CPU 0.10.2).

  Where there is a TPU nothing is set: libtpu refuses flags that it does not know.
  """
  flags = environment.get("XLA_FLAGS", "")
  known = metadata.version("jaxlib").startswith(STEADY_SUMS_JAX)
  if not known or STEADY_SUMS in flags or _has_tpu():
    return {}
  threads = str(max(LEAST_THREADS, os.cpu_count() or 1))
  return {
    "XLA_FLAGS": f"{flags} {STEADY_SUMS}".strip(),
    "NPROC": environment.get("NPROC", threads),
  }


def _cpu() -> str:
  """Returns a short name of this machine's kind of CPU."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  features = next((x for x in lines if x.startswith(("flags", "Features"))), "")
  digest = hashlib.sha256(features.encode()).hexdigest()[:8]
  return f"{platform.machine()}-{digest}"


def _has_tpu() -> bool:
  devices = [*pathlib.Path("/dev").glob("accel*")]
  return bool(devices or [*pathlib.Path("/dev/vfio").glob("[0-9]*")])
