"""Many hosts: joining them, ending them together, and being told to stop.

All hosts of a TPU slice run the same command. TPU VMs find each other, as do the tasks
of SLURM's srun and Open MPI's mpirun; elsewhere three flags name the coordinator, the
number of hosts and this one.
"""

import atexit
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import threading
import time

from absl import logging
import jax
from jax._src import xla_bridge  # JAX 0.10 offers no public way to ask
from jax.experimental import multihost_utils
import jax.extend

from llamagen_jax.errors import UserError
from llamagen_jax.options import option

# A host that gives no sign of life for so long is dead, and ends the others.
HEARTBEAT_SECONDS = 40
FAILURE_FOLDER = "llamagen/failure/"  # in the coordinator's store: {host, code, reason}
WATCH_SECONDS = 1.0  # between two looks there
NOTICE_SECONDS = 5  # that the coordinator outlives a failure, so that all hear of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
  """Several hosts; TPU VMs and the tasks of srun or mpirun find each other without."""

  coordinator: str | None = option("address of host 0", None, unit="HOST:PORT")
  hosts: int | None = option("how many hosts run the command", None, at_least=1)
  host: int | None = option("which of them this one is, from 0", None, at_least=0)


@contextlib.contextmanager
def cpu_only() -> Iterator[None]:
  """Keeps JAX to the CPU, as another process may hold the accelerator.

  Afterwards JAX may use the accelerator again. Where the process has asked for
  devices already, nothing changes.
  """
  if xla_bridge.backends_are_initialized():
    yield
    return
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", "cpu")
  try:
    yield
  finally:
    jax.config.update("jax_platforms", before)
    jax.extend.backend.clear_backends()


def initialize_distributed(options: HostOptions) -> None:
  """Joins the other hosts, once. To be called before anything asks for a device."""
  if jax.distributed.is_initialized():
    return
  names = [field.name for field in dataclasses.fields(HostOptions)]
  named = {name: getattr(options, name) for name in names}
  missing = [name for name, value in named.items() if value is None]
  timeout = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
  if not missing:
    try:
      jax.distributed.initialize(*named.values(), **timeout)
    except ValueError as error:
      raise UserError(f"--coordinator, --hosts, --host: {error}") from error
  elif len(missing) < len(named):
    raise UserError(f"--coordinator, --hosts and --host go together: no --{missing[0]}")
  elif started_by_launcher() or (on_tpu_vm() and not is_single_host()):
    jax.distributed.initialize(**timeout)
  if jax.distributed.is_initialized():
    logging.info("host %d of %d", jax.process_index(), jax.process_count())
    _watch_others()


def started_by_launcher() -> bool:
  """Returns whether srun or Open MPI's mpirun started this process beside others.

  JAX reads from their variables who the others are, and takes one GPU a process. The
  script of a SLURM batch is no task of srun: it lacks the list of the step's nodes.
  """
  counts = {"SLURM_STEP_NODELIST": "SLURM_NTASKS",
            "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}  # fmt: skip
  return any(
    mark in os.environ and int(os.environ.get(count, "1")) > 1
    for mark, count in counts.items()
  )


def on_tpu_vm() -> bool:
  """Returns whether this machine has TPU chips, without starting them."""
  accelerators = [*pathlib.Path("/dev").glob("accel[0-9]*")]
  vfio = [p for p in pathlib.Path("/dev/vfio").glob("*") if p.name.isdigit()]
  google = pathlib.Path("/sys/class/dmi/id/product_name")
  on_google = google.exists() and google.read_text().startswith("Google")
  return bool(accelerators or vfio) and on_google


def is_single_host() -> bool:
  """Returns whether a TPU's environment names no host but this one.

  A notebook's does so: it has no metadata server, and `TPU_SKIP_MDS_QUERY` is set.
  """
  if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:  # of several slices
    return False
  workers = os.environ.get("TPU_PROCESS_ADDRESSES")
  workers = workers or os.environ.get("TPU_WORKER_HOSTNAMES")
  if workers is None:
    return "TPU_SKIP_MDS_QUERY" in os.environ
  return "," not in workers


def end_all_hosts(reason: str, code: int, details: str = "") -> None:
  """Ends this process and all other hosts, which print `reason` in one line.

  To be called when a verb has failed; does nothing on a single host. Without it the
  others would wait for this one in a barrier, five minutes long. `details` are printed
  by this host.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return
  print(details, end="", file=sys.stderr)
  failure = {"host": jax.process_index(), "code": code, "reason": reason}
  try:
    store().key_value_set(f"{FAILURE_FOLDER}first", json.dumps(failure))
    _let_others_leave()
  except (RuntimeError, ValueError):
    pass  # another host failed first, or the coordinator is gone
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _watch_others() -> None:
  """Starts a thread that ends this process once another host has failed."""
  over = threading.Event()
  thread = threading.Thread(target=_end_with_others, args=(over,), daemon=True)
  thread.start()

  def join():  # a thread that is in a call of JAX while Python ends aborts the process
    over.set()
    thread.join()

  atexit.register(join)


def _end_with_others(over: threading.Event) -> None:
  while not over.wait(WATCH_SECONDS):
    try:
      found = store().key_value_dir_get(FAILURE_FOLDER)
    except (RuntimeError, AttributeError):  # the coordinator is gone, or JAX left it
      continue
    if not found:
      continue
    failure = json.loads(found[0][1])
    if failure["host"] != jax.process_index():
      message = f"llamagen: host {failure['host']} failed: {failure['reason']}"
      print(message, file=sys.stderr, flush=True)
      _let_others_leave()
      os._exit(failure["code"])
    return


def _let_others_leave() -> None:
  """Waits on the coordinator: where it ends first, JAX aborts the other processes."""
  if jax.process_index() == 0:
    time.sleep(NOTICE_SECONDS)


def store():
  """Returns the client of the coordinator's key-value store; not public in JAX 0.10."""
  return jax._src.distributed.global_state.client


class StopSignal:
  """Notes SIGTERM, as of a TPU VM's preemption or maintenance, and Ctrl-C.

  With several hosts JAX passes the notice on, and all of them learn of it at one
  and the same step; `should_stop` is therefore called once at every step. A second
  Ctrl-C ends the process at once.
  """

  def __init__(self):
    self._caught = False
    self._before = {}
    # JAX's preemption service has a handler of its own for SIGTERM.
    self._single = not jax.distributed.is_initialized()

  def should_stop(self, step: int) -> bool:
    """Returns whether the run ends before this step, alike on all hosts."""
    if self._single:
      return self._caught
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      caught = [signal.SIGINT, *([signal.SIGTERM] if self._single else [])]
      self._before = {number: signal.signal(number, self._catch) for number in caught}
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _catch(self, number, frame) -> None:
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      print("stopping; Ctrl-C again ends at once", file=sys.stderr)
      if not self._single:
        os.kill(os.getpid(), signal.SIGTERM)
    self._caught = True
