"""Many hosts, and being told to stop: what a run needs to know of its cluster.

All hosts of a TPU slice run the same command. On a TPU VM they find each other;
elsewhere three flags name the coordinator, the number of hosts and this one.
"""

import argparse
import os
import pathlib
import signal
import threading

from absl import flags, logging
import jax
from jax.experimental import multihost_utils

from llamagen_jax.errors import UserError

FLAGS = {
  "coordinator": (str, "HOST:PORT of host 0, for several hosts that are not TPU VMs."),
  "hosts": (int, "How many hosts run."),
  "host": (int, "Which one this is, from 0."),
}


def define_flags(values: flags.FlagValues) -> None:
  for name, (kind, text) in FLAGS.items():
    define = flags.DEFINE_string if kind is str else flags.DEFINE_integer
    define(name, None, text, flag_values=values)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The same, for a verb without a config."""
  group = parser.add_argument_group("several hosts")
  for name, (kind, text) in FLAGS.items():
    group.add_argument(f"--{name}", type=kind, help=text)


def initialize_distributed(values: flags.FlagValues | argparse.Namespace) -> None:
  """Joins the other hosts, once. To be called before anything asks for a device."""
  if jax.distributed.is_initialized():
    return
  if isinstance(values, flags.FlagValues):
    named = {name: values[name].value for name in FLAGS}
  else:
    named = {name: getattr(values, name) for name in FLAGS}
  missing = [name for name, value in named.items() if value is None]
  if not missing:
    try:
      jax.distributed.initialize(*named.values())
    except ValueError as error:
      raise UserError(f"--coordinator, --hosts, --host: {error}") from error
  elif len(missing) < len(named):
    raise UserError(f"--coordinator, --hosts and --host go together: no --{missing[0]}")
  elif on_tpu_vm() and not is_single_host():
    jax.distributed.initialize()
  if jax.distributed.is_initialized():
    logging.info("host %d of %d", jax.process_index(), jax.process_count())


def on_tpu_vm() -> bool:
  """Whether this machine has TPU chips, found out without starting them."""
  accelerators = [*pathlib.Path("/dev").glob("accel[0-9]*")]
  vfio = [p for p in pathlib.Path("/dev/vfio").glob("*") if p.name.isdigit()]
  google = pathlib.Path("/sys/class/dmi/id/product_name")
  on_google = google.exists() and google.read_text().startswith("Google")
  return bool(accelerators or vfio) and on_google


def is_single_host() -> bool:
  """Whether a TPU's environment names no host but this one, as a notebook's does.

  There is no metadata server to ask there, and `TPU_SKIP_MDS_QUERY` says so.
  """
  if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:  # of several slices
    return False
  workers = os.environ.get("TPU_PROCESS_ADDRESSES")
  workers = workers or os.environ.get("TPU_WORKER_HOSTNAMES")
  if workers is None:
    return "TPU_SKIP_MDS_QUERY" in os.environ
  return "," not in workers


class StopSignal:
  """SIGTERM, which also announces the preemption or maintenance of a TPU VM.

  With several hosts JAX passes the notice on, and all of them learn of it at one
  and the same step; `asked` is therefore called once at every step.
  """

  def __init__(self):
    self._caught = False
    self._before = None
    # JAX's preemption service has a handler of its own.
    self._alone = not jax.distributed.is_initialized()

  def should_stop(self, step: int) -> bool:
    if self._alone:
      return self._caught
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "StopSignal":
    if self._alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._catch)
    return self

  def __exit__(self, *error) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _catch(self, number, frame) -> None:
    self._caught = True
