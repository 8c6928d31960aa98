"""Refuses files that every clone and every TPU worker would have to download.

`python tests/large_files.py FILE ...`, as pre-commit calls it.
"""

import pathlib
import sys

LIMIT = 600_000  # bytes; the largest golden file has 400 kB
ARCHIVES = (".whl", ".zip", ".tar", ".gz", ".tgz", ".egg", ".pt", ".safetensors")


def problems(files: list[str]) -> list[str]:
  """Returns a line for every file that is too large or an archive."""
  lines = []
  for file in map(pathlib.Path, files):
    if not file.is_file():
      continue
    size = file.stat().st_size
    if size > LIMIT:
      lines.append(f"{file}: {size} bytes, expected at most {LIMIT}")
    if file.name.endswith(ARCHIVES):
      lines.append(f"{file}: an archive; depend on the package instead")
  return lines


if __name__ == "__main__":
  found = problems(sys.argv[1:])
  print("\n".join(found))
  sys.exit(bool(found))
