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
