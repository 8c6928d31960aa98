import os
import subprocess
import sys

PROCESS = """
import time

import grain

from llamagen_jax.data.workers import in_processes

if __name__ == "__main__":
  numbers = grain.MapDataset.range(1000).to_iter_dataset()
  read = iter(in_processes(numbers, 2, 1))
  print(next(read), flush=True)
  time.sleep(300)
"""


def test_workers_end_with_the_process_that_they_read_for(tmp_path):
  (tmp_path / "reader.py").write_text(PROCESS)
  command = [sys.executable, tmp_path / "reader.py"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "0\n"
  process.kill()
  process.communicate(timeout=60)  # which they hold open until they end


KILLED = """
import multiprocessing
import os
import signal

from llamagen_jax.data.loader import Stream

if __name__ == "__main__":
  transform = lambda element, rng: {"x": element}
  batches = Stream(range(1000), transform, 4, 0, workers=2).host_batches(0)
  next(batches)
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  try:
    for _ in range(10**6):
      next(batches)
  except Exception as error:
    print(error)
"""


def test_a_worker_that_is_killed_is_reported_without_a_traceback(tmp_path):
  (tmp_path / "reader.py").write_text(KILLED)
  command = [sys.executable, tmp_path / "reader.py"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert "terminated unexpectedly with exit code -9" in done.stdout
  assert "Traceback" not in done.stderr
