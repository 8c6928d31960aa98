"""`llamagen reconstruct`: encodes and decodes a source, and measures what is kept.

Writes reconstructions.npz (`arr_0`, uint8, in the source's order, which is what the
evaluator reads), originals.npz, a grid of pictures and metrics.json.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import pathlib

import jax
import numpy as np
import tqdm

from llamagen_jax import bundle, pictures
from llamagen_jax.data.images import CenterPicture, open_source
from llamagen_jax.data.loader import epoch_batches
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.interop.lpips import load_lpips
from llamagen_jax.training.mesh import make_mesh, replicated


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser("llamagen reconstruct", description=__doc__)
  add = parser.add_argument
  add("--tokenizer", required=True, help="bundle of the tokenizer")
  add("--source", required=True, help="pictures: folder:, jsonl:, arrayrecord:, tfds:")
  add("--out", required=True, help="folder to write")
  add("--image-size", type=int, required=True, help="side of the centre crop")
  add("--batch-size", type=int, default=16, help="pictures a step on every chip")
  add("--lpips", default="", help="LPIPS's and VGG16's weights, to measure LPIPS too")
  add("--shown", type=int, default=8, help="pictures in the grid")
  add("--min-side", type=int, default=16, help="smaller pictures are bad ones")
  args = parser.parse_args(argv)

  mesh = make_mesh()
  tokenizer, source = (
    bundle.load_tokenizer(args.tokenizer, mesh),
    open_source(args.source),
  )
  side, config = args.image_size, tokenizer.config
  if side % config.downsample:
    raise UserError(
      f"--image-size={side} is not a multiple of the tokenizer's downsampling"
      f" {config.downsample}"
    )
  lpips_params = None
  if args.lpips:
    lpips_params = jax.device_put(load_lpips(args.lpips), replicated(mesh))
  transform = CenterPicture(side, args.min_side)
  batches = epoch_batches(source, transform, args.batch_size * mesh.size, mesh)
  out, main_host = pathlib.Path(args.out), jax.process_index() == 0
  kept: dict[str, list[np.ndarray]] = {"originals": [], "reconstructions": []}
  with tqdm.tqdm(
    total=len(source), desc="reconstruct", unit="picture", dynamic_ncols=True,
    disable=not main_host,
  ) as bar:  # fmt: skip

    def keep(originals: np.ndarray, reconstructions: np.ndarray) -> None:
      bar.update(len(originals))
      if main_host:
        kept["originals"].append(originals)
        kept["reconstructions"].append(reconstructions)

    found = reconstruct(
      config, tokenizer.params, batches, args.shown, lpips_params, keep
    )
  if not main_host:
    return
  out.mkdir(parents=True, exist_ok=True)
  for name, parts in kept.items():
    pictures.save_npz(out / f"{name}.npz", parts, found.pictures, None)
  rows = np.concatenate([found.originals, found.reconstructions])
  sheet = pictures.grid(rows, columns=len(found.originals))
  pictures.save_png(out / "reconstructions.png", sheet)
  report = {
    **found.metrics,
    "pictures": found.pictures,
    "skipped": len(source) - found.pictures,
    "image_size": side,
    "source": args.source,
    "tokenizer": tokenizer.identity,
    "model": dataclasses.asdict(config),
  }
  part = out / ".metrics.json.part"
  part.write_text(json.dumps(report, indent=1))
  part.rename(out / "metrics.json")
  shown = "  ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
  print(
    f"{found.pictures} pictures, {report['skipped']} skipped: {shown}\n"
    f"{out}/reconstructions.npz  {out}/originals.npz  {out}/reconstructions.png"
  )
