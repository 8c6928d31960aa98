"""`llamagen`, killed between two of its writes.

argv: FOLDER, AFTER, SECONDS and the words of a command. What the process does to the
names under FOLDER is counted: files opened for writing, renamed, removed, new folders.
It is killed SECONDS after number AFTER, or right before the next one if that comes
sooner. AFTER = 0 kills nothing, and the last line printed is the count.
"""

import itertools
import os
import signal
import sys
import threading
import time

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def watch(folder: str, after: int, seconds: float) -> itertools.count:
  numbers = itertools.count(1)

  def hook(event: str, args: tuple) -> None:
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if not (writes or event in CHANGES) or isinstance(args[0], int):
      return
    path = os.path.abspath(os.fsdecode(args[0]))
    if path != folder and not path.startswith(folder + os.sep):
      return
    number = next(numbers)
    if after and number == after:
      threading.Thread(target=kill, args=(seconds,), daemon=True).start()
    elif after and number > after:
      kill(0)

  sys.addaudithook(hook)
  return numbers


def kill(seconds: float) -> None:
  time.sleep(seconds)
  os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
  folder, after, seconds, *words = sys.argv[1:]
  counted = watch(os.path.abspath(folder), int(after), float(seconds))
  from llamagen_jax.commands import cli

  code = cli.run(words)
  print(next(counted) - 1, flush=True)
  sys.exit(code)
