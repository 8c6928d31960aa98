"""Hosts that do shards of their own, each at its pace: meeting and stopping.

Nothing here runs on the devices or has a time limit: one host may be done hours
before another.
"""

import collections
import signal
import sys
import threading
import time

import jax

from llamagen_jax.parallel.hosts import store

STOP_FOLDER = "llamagen/stop/"  # keys of the coordinator's store
POLL_SECONDS = 0.5
_meetings = collections.Counter()


class StopRequest:
  """Notes SIGTERM and Ctrl-C of any host; asked for between two shards.

  A second Ctrl-C ends the process at once.
  """

  def __init__(self):
    self._caught = self._told = False
    self._before = {}

  def is_set(self) -> bool:
    """Returns whether this host, or any other, was told to stop."""
    if jax.process_count() == 1:
      return self._caught
    if self._caught and not self._told:
      store().key_value_set(f"{STOP_FOLDER}{jax.process_index()}", "")
      self._told = True
    return self._caught or bool(store().key_value_dir_get(STOP_FOLDER))

  def __enter__(self) -> "StopRequest":
    # With several hosts this replaces the handler of JAX's preemption service, which
    # stops all of them at one and the same step: here they count different ones.
    if threading.current_thread() is threading.main_thread():
      caught = (signal.SIGTERM, signal.SIGINT)
      self._before = {number: signal.signal(number, self._catch) for number in caught}
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _catch(self, number, frame) -> None:
    self._caught = True
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    print("stopping after this shard", file=sys.stderr, flush=True)


def gather(name: str, value: str = "", stop: StopRequest | None = None) -> list[str]:
  """Waits for all hosts and returns the value of each, in their order.

  Nobody leaves before all have come: a host that did would be missed in the next
  meeting by those that were found complete.

  Args:
    name: of the meeting; its next one has the same name.
    value: of this host.
    stop: while waiting, the others are told of one that comes to this host.
  """
  if jax.process_count() == 1:
    return [value]
  _meetings[name] += 1
  folder = f"llamagen/{name}/{_meetings[name]}/"
  store().key_value_set(f"{folder}{jax.process_index():06d}", value)
  while len(found := store().key_value_dir_get(folder)) < jax.process_count():
    if stop is not None:
      stop.is_set()
    time.sleep(POLL_SECONDS)
  return [value for _, value in sorted(found)]
