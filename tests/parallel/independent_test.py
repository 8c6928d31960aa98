import threading
import time

import pytest

from llamagen_jax.parallel import independent


class Store(dict):
  """The coordinator's store, of two hosts that are threads here."""

  key_value_set = dict.__setitem__

  def key_value_dir_get(self, folder):
    return [(k, value) for k, value in list(self.items()) if k.startswith(folder)]


class Once:
  """Counts for each of the hosts: this is their first meeting."""

  def __getitem__(self, name):
    return 1

  def __setitem__(self, name, count):
    pass


@pytest.fixture
def host(monkeypatch):
  """What a thread sets to its number."""
  here, shared = threading.local(), Store()
  monkeypatch.setattr(independent, "store", lambda: shared)
  monkeypatch.setattr(independent, "_meetings", Once())
  monkeypatch.setattr(independent, "POLL_SECONDS", 0.01)
  monkeypatch.setattr(independent.jax, "process_count", lambda: 2)
  monkeypatch.setattr(independent.jax, "process_index", lambda: here.number)
  return here


def test_nobody_leaves_a_meeting_before_all_have_come(host):
  """Told to stop, the first one waits as well, and the other one hears of it."""
  found, stops = {}, [independent.StopRequest(), independent.StopRequest()]

  def meet(number, value):
    host.number = number
    found[number] = independent.gather("written", value, stops[number])

  stops[0]._caught = True
  first = threading.Thread(target=meet, args=(0, ""))
  first.start()
  deadline = time.monotonic() + 60
  while not stops[0]._told and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not found
  host.number = 1
  assert stops[1].is_set()
  meet(1, "stopped")
  first.join()
  assert found == {0: ["", "stopped"], 1: ["", "stopped"]}
