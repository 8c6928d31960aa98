"""Large pages for large arrays: what Linux gives only to programs that ask."""

import os
import sys

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def ask_for_large_pages() -> None:
  """Starts this process anew with the variable that glibc reads before a program runs.

  With pages of 4 kB a CPU spends a sixth of a train step on finding them. To be called
  first of all; does nothing where the variable says something of pages already.
  """
  settings = os.environ.get(VARIABLE, "")
  if sys.platform != "linux" or SETTING in settings:
    return
  asked = ":".join(filter(None, (settings, f"{SETTING}=1")))
  arguments = [sys.executable, *sys.orig_argv[1:]]
  os.execve(sys.executable, arguments, os.environ | {VARIABLE: asked})
