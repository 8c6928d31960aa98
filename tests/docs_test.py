"""The commands and programs of README and docs run, on little data.

A block that needs a pod, a download, a GPU, a server or many minutes has a comment
before it, `<!-- needs: pod -->`. All others are executed, in the order of their page
and in one folder: `llamagen` is replaced by a script that shortens what takes long.
"""

import os
import pathlib
import re
import stat
import subprocess
import sys

import pytest

from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
NEEDS = {"pod", "download", "gpu", "server", "libtpu", "minutes"}
BLOCK = re.compile(
  r"(?:^<!-- (needs|run): ([\w ]+) -->\n)?^```(bash|python)\n(.*?)^```", re.M | re.S
)
# What shortens a verb; the rest of its command is as it stands on the page.
SHORT = {
  "quickstart": ["--fast"],
  "train-tokenizer": [
    "--config.model.channel_multipliers=(1,2,2,2,2)", "--config.model.width=8",
    "--config.model.norm_groups=4", "--config.model.latent_width=8",
    "--config.model.res_blocks=1", "--config.model.codebook_size=64",
    "--config.data.image_size=64", "--config.data.min_side=8",
    "--config.data.batch_size=2", "--config.data.workers=2", "--config.run.steps=2",
    "--config.optimizer.warmup_steps=0", "--config.discriminator.width=4",
    "--config.discriminator.layers=1",
  ],
  "extract-codes": ["--image-size=64", "--min-side=8", "--shards=1", "--batch-size=2"],
  "reconstruct": ["--image-size=64", "--min-side=8", "--batch-size=2"],
  "train-gpt": [
    "--config.model.layers=1", "--config.model.heads=2", "--config.model.dim=16",
    "--config.model.grid=4", "--config.model.num_classes=2",
    "--config.data.batch_size=2", "--config.data.workers=2",
    "--config.model.dtype=float32", "--config.run.steps=2",
    "--config.optimizer.warmup_steps=0",
  ],
}  # fmt: skip
SHIM = """#!{python}
import sys
from llamagen_jax.commands import cli
if __name__ == "__main__":  # workers that read images import this file, too
  sys.exit(cli.run([*sys.argv[1:], *{short!r}.get(sys.argv[1], [])]))
"""


def blocks(page: pathlib.Path) -> list[tuple[str, str, str]]:
  """Returns (mark, language, text) of every block of bash or Python."""
  return [
    (f"{m[1]}: {m[2]}" if m[1] else "", m[3], m[4])
    for m in BLOCK.finditer(page.read_text())
  ]


def to_run(page: pathlib.Path) -> list[tuple[str, str]]:
  return [(kind, text) for mark, kind, text in blocks(page) if "needs" not in mark]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_known(page):
  for mark, _, _ in blocks(page):
    kind, _, what = mark.partition(": ")
    assert not mark or what in NEEDS or kind == "run", mark


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
  text = page.read_text()
  for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
    if not target.startswith("http"):
      assert (page.parent / target).exists(), target
  for path in re.findall(r"`((?:configs|launch|docs|benchmarks)/[\w./]+\.\w+)`", text):
    assert (ROOT / path).exists(), path


def test_every_guidance_schedule_has_its_formula():
  text = (ROOT / "docs/sampling.md").read_text()
  assert all(
    re.search(rf"^\| `{name}`.* \|$", text, re.M) for name in GUIDANCE_SCHEDULES
  )


def test_extras_exist():
  extras = re.search(r"EXTRAS = \{(.*?)\n\}", (ROOT / "setup.py").read_text(), re.S)[1]
  known = set(re.findall(r'^  "([\w-]+)": ', extras, re.M))
  for page in PAGES:
    for named in re.findall(r"pip install -e '\.\[([\w,-]+)\]'", page.read_text()):
      assert set(named.split(",")) <= known, (page.name, named)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with images, and a short `llamagen`; pip and pytest do nothing."""
  folder = tmp_path_factory.mktemp("docs")
  tiny.write_images(folder / "my_images", side=72)
  tools = folder / "bin"
  tools.mkdir()
  scripts = {"llamagen": SHIM.format(python=sys.executable, short=SHORT)}
  scripts |= dict.fromkeys(("pip", "pytest", "pre-commit"), "#!/bin/sh\nexit 0\n")
  for name, text in scripts.items():
    (tools / name).write_text(text)
    (tools / name).chmod(stat.S_IRWXU)
  (tools / "python").symlink_to(sys.executable)
  environment = os.environ | {
    "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
  }  # fmt: skip
  return folder, environment


@pytest.mark.slow
def test_blocks_run(place):
  """Later blocks use what earlier ones made, README's first: all are one test."""
  folder, environment = place
  pages = [p for p in PAGES if p.name != "CONTRIBUTING.md"]  # it makes a real .venv
  blocks_to_run = [(p.name, *block) for p in pages for block in to_run(p)]
  for name, kind, text in blocks_to_run:
    interpreter = ["bash", "-euc"] if kind == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
      [*interpreter, text], cwd=folder, env=environment, capture_output=True, text=True,
      check=False,
    )  # fmt: skip
    said = f"{name}: {text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
