"""Tables of ahead-of-time figures, from docs/results/compile_for_pod.json.

    python docs/tables.py                  prints them as Markdown
    python docs/tables.py --write          puts them between their markers
    python docs/tables.py --check          fails where README.md, docs/ or the hours
                                           in the docstrings of configs/ differ
    python docs/tables.py --compile v6e    compiles the rows whose flags contain `v6e`


A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "compile_for_pod.json"
CONFIGS = HERE.parent / "configs"
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GIB = 2**30


def memory(figures: dict) -> str:
  total = f"{figures['hbm'] / GIB:.1f}"
  return total if figures["machine_code"] else f"{total} *"


def milliseconds(figures: dict) -> str:
  return ", ".join(f"{1e3 * t:.0f}" for t in figures["seconds"].values())


def hours(figures: dict) -> str:
  return f"{number(figures['chip_hours'] / figures['chips'])} h"


def number(value: float) -> str:
  return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def step(figures: dict) -> str:
  steps = figures.get("steps", figures["codes"])  # of the chunk, or of an image
  ms = 1e3 * figures["least_seconds"] / steps
  return f"{ms:.1f} ms a step, {figures['images_per_second']:.1f} images/s"


TRAIN = {
  "GiB a chip": memory,
  "FLOPs / model's": lambda f: f"{f['flops'] / f['model_flops']:.2f}",
  "least ms compute, HBM, ICI (, DCN)": milliseconds,
}
# Table -> its columns: heading, and the cell of a row's figures.
TABLES = {
  "train": TRAIN | {"at best, whole recipe": hours},
  "successors": TRAIN | {"at best, all such steps": hours},
  "sampler": {
    "GiB a chip": memory,
    "bytes / least": lambda f: f"{f['bytes'] / f['least_bytes']:.2f}",
    "at best, a chip": step,
  },
  "engine": {
    "temporaries / arguments": lambda f: (
      f"{100 * f['memory']['temporaries'] / f['memory']['arguments']:.1f} %"
      + ("" if f["machine_code"] else " *")
    ),
    "bytes / least": lambda f: f"{f['bytes'] / f['least_bytes']:.2f}",
    "at best, a chip": step,
    "images/s by the least": lambda f: f"{f['bound']:.1f}",
  },
}


def render(table: str, rows: list[dict]) -> str:
  """Returns a table of those rows that were compiled, with the versions below."""
  columns = TABLES[table]
  done = [row for row in rows if row["table"] == table and row.get("figures")]
  lines = [["model", "topology", *columns], ["---"] * (2 + len(columns))]
  for row in done:
    figures = row["figures"]
    cells = [cell(figures) for cell in columns.values()]
    name = row["name"] + (" †" if figures.get("rounded") else "")
    lines.append([name, figures["topology"], *cells])
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  return f"{text}\n{'; '.join(notes([row['figures'] for row in done]))}"


def notes(done: list[dict]) -> list[str]:
  """Returns the versions that made the figures, and what the marks mean."""
  new = sorted({(f["jax"], f["libtpu"]) for f in done if not f.get("rounded")})
  old = sorted({f["version"] for f in done if f.get("rounded")})
  return [
    *(f"jax {jax}, libtpu {libtpu}" for jax, libtpu in new),
    *(f"† rounded, as version {version} of this project had it" for version in old),
    *(
      ["* without the scratch memory of kernels (`--quick`)"]
      if not all(f["machine_code"] for f in done)
      else []
    ),
  ]


def replaced(text: str, rows: list[dict]) -> str:
  """Returns a page with its tables rendered anew."""
  return BLOCK.sub(lambda m: f"{m[1]}\n{render(m[2], rows)}.\n\n{m[3]}", text)


def wrong_hours(rows: list[dict]) -> list[str]:
  """Returns the lines of the recipes' docstrings whose hours are not those of a row."""
  known = {row["flags"]: row["figures"] for row in rows if row.get("figures")}
  wrong = []
  for file in sorted(CONFIGS.glob("*.py")):
    for arg, claims in re.findall(
      r"^    :(\S+) +(v.+)$", file.read_text(), re.MULTILINE
    ):
      for topology, claimed in re.findall(r"(v\w+:[\dx]+) +([\d.]+ h)", claims):
        flags = f"--config=configs/{file.name}:{arg} --topology={topology}"
        if flags in known and float(hours(known[flags])[:-2]) != float(claimed[:-2]):
          wrong.append(f"{file}: :{arg} {topology} {claimed}")
  return wrong


def compile_row(row: dict, quick: bool) -> None:
  """Runs compile-for-pod on a row, and keeps its figures if it succeeds."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "figures.json"
    command = ["llamagen", "compile-for-pod", *shlex.split(row["flags"])]
    command += [f"--json={file}", *(["--quick"] if quick else [])]
    print(shlex.join(command), file=sys.stderr)
    done = subprocess.run(command, check=False, cwd=HERE.parent)
    if done.returncode == 0:
      row["figures"] = json.loads(file.read_text())


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", action="store_true")
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--compile", metavar="TEXT")
  parser.add_argument("--quick", action="store_true", help="as compile-for-pod's")
  parser.add_argument(
    "--missing", action="store_true", help="only rows without figures"
  )
  args = parser.parse_args()
  rows = json.loads(RESULTS.read_text())
  for row in rows if args.compile is not None else ():
    if args.compile in row["flags"] and not (args.missing and row.get("figures")):
      compile_row(row, args.quick)
      RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
  wrong = 0
  for page in PAGES if args.write or args.check else ():
    text = page.read_text()
    new = replaced(text, rows)
    if new != text and args.write:
      page.write_text(new)
    elif new != text:
      print(f"{page}: a table differs from {RESULTS.name}; run docs/tables.py --write")
      wrong = 1
  for line in wrong_hours(rows) if args.check else ():
    print(f"{line}: differs from {RESULTS.name}")
    wrong = 1
  if not (args.write or args.check or args.compile is not None):
    for table in TABLES:
      print(
        f"<!-- table: {table} -->\n\n{render(table, rows)}.\n\n<!-- end of table -->"
      )
  return wrong


if __name__ == "__main__":
  sys.exit(main())
