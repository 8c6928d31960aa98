"""Measures several tokenizers on the same images: one table, one grid.

The VAEs of Stable Diffusion and SDXL may be among them, as references without codes.

Writes comparison.md, comparison.json and comparison.png (every original with each
tokenizer's reconstruction and difference), and the files of `llamagen reconstruct` in a
folder for each tokenizer.

llamagen compare-tokenizers --tokenizer vq16 taming ibq --source=folder:/data/val \\
    --image-size=256 --out=comparison
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import os
import time
from typing import Any

import jax
import numpy as np

from llamagen_jax.commands import arguments, reconstruct
from llamagen_jax.errors import UserError
from llamagen_jax.images import from_uint8, grid, save_png
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.storage import user_path, write_json, write_text
from llamagen_jax.weights.published import published_tokenizers

SPEED_RUNS = 3  # of which the fastest counts
AMPLIFIED = 4  # differences in the grid
# Of the report -> title and format of the table's column.
COLUMNS = {
  "codes": ("codes", "d"),
  "bits_a_pixel": ("bits a pixel", ".4f"),
  "psnr": ("PSNR", ".2f"),
  "ssim": ("SSIM", ".4f"),
  "ssim_lg": ("SSIM, range 2", ".4f"),
  "lpips": ("LPIPS", ".4f"),
  "rFID": ("rFID", ".2f"),
  "usage": ("codes used", ".1%"),
  "encode": ("encoded a second", ".1f"),
  "decode": ("decoded a second", ".1f"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(reconstruct.Options):
  """Options of compare-tokenizers."""

  tokenizer: tuple[str, ...] = option("bundles of the tokenizers", unit="FOLDER")


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "compare-tokenizers", argv, __doc__)
  hosts.initialize_distributed(args)
  names = _names(args.tokenizer)
  fields = {
    field.name: getattr(args, field.name)
    for field in dataclasses.fields(reconstruct.Options)
  }
  rows, outcomes = {}, []
  for name, path in zip(names, args.tokenizer, strict=True):
    changed = {"tokenizer": path, "out": os.path.join(args.out, name)}
    outcome = reconstruct.run(reconstruct.Options(**fields | changed))
    outcomes.append(outcome)
    rows[name] = _row(outcome, args.image_size)
  if jax.process_index() != 0:
    return
  out = user_path(args.out)
  write_json(out / "comparison.json", rows)
  write_text(out / "comparison.md", table(rows) + "\n")
  save_png(out / "comparison.png", _sheet(names, outcomes))
  print(f"{table(rows)}\n{out}/comparison.png")


def _names(paths: Sequence[str]) -> list[str]:
  """Returns a name for each bundle: that of its folder, or of the run it lies in."""
  names = []
  for path in paths:
    folder, name = os.path.split(path.rstrip("/"))
    names.append(os.path.basename(folder) if name == "bundle" and folder else name)
  if len(set(names)) < len(names):
    raise UserError(f"--tokenizer: folders of the same name, {', '.join(names)}")
  return names


def _row(outcome: reconstruct.Outcome, side: int) -> dict[str, Any]:
  """Returns the measurements of one tokenizer, and the published ones of its shape."""
  tokenizer, config = outcome.tokenizer, outcome.tokenizer.config
  images = from_uint8(outcome.found.originals)
  codes = tokenizer.encode(images)
  row = outcome.found.metrics | {
    "encode": _images_a_second(tokenizer.encode, images),
    "decode": _images_a_second(tokenizer.decode, codes),
    "published": published_tokenizers(config),
  }
  if not config.continuous:
    row["codes"] = config.codebook_size
    row["bits_a_pixel"] = math.log2(config.codebook_size) * codes[0].size / side**2
  if outcome.scores is not None:
    scores = outcome.scores["scores"]
    row["rFID"] = (scores.get("rFID") or scores["FID"])["ours"]
  return row


def _images_a_second(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
  """Returns the speed of a batch after the first, which compiles."""
  jax.block_until_ready(function(x))
  seconds = []
  for _ in range(SPEED_RUNS):
    start = time.perf_counter()
    jax.block_until_ready(function(x))
    seconds.append(time.perf_counter() - start)
  return len(x) / min(seconds)


def table(rows: dict[str, dict[str, Any]]) -> str:
  """Returns the rows in Markdown, with the published figures in brackets.

  "-" stands for what was not measured, or what a continuous autoencoder has not.
  """
  columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
  titles = ["tokenizer", *(COLUMNS[key][0] for key in columns), "published as"]
  lines = [titles, ["---"] * len(titles)]
  for name, row in rows.items():
    cells = [_cell(row, key) for key in columns]
    lines.append([name, *cells, " or ".join(row["published"]) or "-"])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any], key: str) -> str:
  text = format(row[key], COLUMNS[key][1]) if key in row else "-"
  published = [f"{s[key]:g}" for s in row["published"].values() if key in s]
  return f"{text} ({' or '.join(published)})" if published else text


def _sheet(names: Sequence[str], outcomes: Sequence[reconstruct.Outcome]):
  """Returns the grid: a row for each image, two columns for each tokenizer."""
  tiles, labels = [], []
  originals = outcomes[0].found.originals
  for i, original in enumerate(originals):
    tiles.append(original)
    labels.append("original")
    for name, outcome in zip(names, outcomes, strict=True):
      made = outcome.found.reconstructions[i]
      difference = np.abs(made.astype(int) - original) * AMPLIFIED
      tiles += [made, 255 - np.minimum(difference, 255).astype(np.uint8)]
      labels += [name, "difference"]
  return grid(np.stack(tiles), columns=1 + 2 * len(names), labels=labels)
