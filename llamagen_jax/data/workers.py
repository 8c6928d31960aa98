"""Processes that read for another one, and do not outlive it."""

import multiprocessing
import os
import threading

from absl import flags
import grain


def in_processes(
  dataset: grain.IterDataset, workers: int, buffered: int
) -> grain.IterDataset:
  """Reads a dataset in processes, each some elements ahead."""
  if not flags.FLAGS.is_parsed():  # Grain reads its own flags in the workers
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(workers, buffered)
  return dataset.mp_prefetch(options, end_with_parent)


def end_with_parent(*_) -> None:
  """Called in a worker: a parent that is killed cannot tell it to end."""

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
