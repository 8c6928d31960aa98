"""Encodes and decodes a source of images, and measures the reconstructions.

Writes reconstructions.npz and originals.npz (`arr_0`, uint8, in the source's order), a
grid of images and metrics.json; with --protocol also rFID, in scores.json.

llamagen reconstruct --tokenizer=vq16/bundle --source=folder:/data/val \\
    --image-size=256 --out=reconstructions
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from llamagen_jax.commands import arguments
from llamagen_jax.data.images import CenterImage, ImageDecoder
from llamagen_jax.data.loader import epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import image_sets, score
from llamagen_jax.evaluation.protocols import PROTOCOLS
from llamagen_jax.evaluation.reconstruction import Reconstruction, reconstruct
from llamagen_jax.images import (
  from_uint8,
  grid,
  resize_bicubic,
  save_npz,
  save_png,
  to_uint8,
)
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.parallel.mesh import make_mesh, replicated
from llamagen_jax.weights import bundle
from llamagen_jax.weights.lpips import load_lpips

SETS = ("originals", "reconstructions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(hosts.HostOptions, score.EvaluationOptions):
  """Options of reconstruct."""

  tokenizer: str = option("bundle of the tokenizer", unit="FOLDER")
  source: str = option(
    "images: folder:, jsonl:, arrayrecord:, captions: or tfds:", unit="KIND:PATH"
  )
  out: str = option("everything is written there", unit="FOLDER")
  image_size: int = option("side of the centre crop", unit="PIXELS", at_least=1)
  batch_size: int = option(
    "images at a time on every device", 16, unit="IMAGES", at_least=1
  )
  lpips: str = option(
    "weights of LPIPS and VGG16, to measure LPIPS, too", "", unit="FILES"
  )
  shown: int = option("images in the grid", 8, unit="IMAGES")
  min_side: int = option("smaller images are bad ones", 16, unit="PIXELS")
  background: str = option("behind transparent pixels", "white", unit="COLOUR")
  ignore_exif: bool = option(
    "leave turned photographs as stored, as the published ImageNet models did; a"
    " protocol does so anyway", False,
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "reconstruct", argv, __doc__)
  if args.protocol and not args.inception:
    raise UserError(f"--protocol={args.protocol} needs --inception")
  hosts.initialize_distributed(args)
  mesh = make_mesh()
  tokenizer = bundle.load_tokenizer(args.tokenizer, mesh)
  source, side, config = open_source(args.source), args.image_size, tokenizer.config
  if side % config.downsample:
    raise UserError(
      f"--image-size={side} is not a multiple of the tokenizer's downsampling"
      f" {config.downsample}"
    )
  evaluate = _evaluator(args, len(source)) if args.protocol else None
  lpips_params = None
  if args.lpips:
    lpips_params = jax.device_put(load_lpips(args.lpips), replicated(mesh))
  # Published scores are of images as stored.
  ignore_exif = args.ignore_exif or args.protocol not in (None, "", "custom")
  decoder = ImageDecoder(args.min_side, args.background, ignore_exif)
  transform = CenterImage(side, decoder)
  batches = epoch_batches(source, transform, args.batch_size * mesh.size, mesh)
  out, main_host = pathlib.Path(args.out), jax.process_index() == 0
  if main_host:
    out.mkdir(parents=True, exist_ok=True)
  spools = [_Spool(out / f".{name}.part", _written_side(args)) for name in SETS]
  with tqdm.tqdm(
    total=len(source), desc="reconstruct", unit="image", dynamic_ncols=True,
    disable=not main_host,
  ) as bar:  # fmt: skip

    def keep(*pair: np.ndarray) -> None:
      bar.update(len(pair[0]))
      if main_host:
        for spool, images in zip(spools, pair, strict=True):
          spool.add(images)

    found = reconstruct(
      config, tokenizer.params, batches, args.shown, lpips_params, keep
    )
  report = {
    **found.metrics,
    "images": found.images,
    "skipped": len(source) - found.images,
    "image_size": side,
    "source": args.source,
    "tokenizer": tokenizer.identity,
    "tokenizer_config": dataclasses.asdict(config),
  }
  if main_host:
    for name, spool in zip(SETS, spools, strict=True):
      save_npz(out / f"{name}.npz", spool.parts(), found.images, None)
      spool.close()
    _write(out, found, report)
  multihost_utils.sync_global_devices("reconstructed")
  if evaluate is not None:
    made, originals = (
      image_sets.open_image_set("--out", out / f"{name}.npz") for name in reversed(SETS)
    )
    result = evaluate(made, originals)
    if result is not None:
      score.write(result, out / "scores.json")
      print(score.table(result))


def _written_side(args: Options) -> int:
  """Larger images than the protocol's are resized to it, as the original's are."""
  side = PROTOCOLS[args.protocol].side if args.protocol else None
  return min(args.image_size, side or args.image_size)


def _evaluator(args: Options, count: int) -> score.Evaluator:
  """Refuses before the long work what would be refused after it."""
  protocol = PROTOCOLS[args.protocol]
  if protocol.reference_statistics:
    raise UserError(
      f"--protocol={args.protocol} is for samples of a transformer; reconstructions"
      " have an rFID"
    )
  if protocol.samples not in (None, count) and not args.mismatched:
    raise UserError(
      f"not {args.protocol}: --source={args.source} has {count} images, expected"
      f" {protocol.samples} (--mismatched evaluates anyway)"
    )
  return score.Evaluator(args)


class _Spool:
  """Images that wait on disk until their number is known."""

  def __init__(self, path: pathlib.Path, side: int):
    self._path, self._side = path, side
    self._file = None
    self._resize = jax.jit(_resized, static_argnums=1)

  def add(self, images: np.ndarray) -> None:
    """uint8 [B, H, H, 3], of which the written side is made."""
    if self._file is None:
      self._file = self._path.open("wb")
    if images.shape[1] != self._side:
      images = np.asarray(self._resize(images, self._side))
    self._file.write(np.ascontiguousarray(images).data)

  def parts(self, size: int = 256) -> Iterator[np.ndarray]:
    self._file.close()
    shape = (-1, self._side, self._side, 3)
    images = np.memmap(self._path, np.uint8, "r").reshape(shape)
    return (images[start : start + size] for start in range(0, len(images), size))

  def close(self) -> None:
    os.unlink(self._path)


def _resized(images: jax.Array, side: int) -> jax.Array:
  resized = resize_bicubic(from_uint8(images), side)
  return to_uint8(resized)


def _write(out: pathlib.Path, found: Reconstruction, report: dict) -> None:
  rows = np.concatenate([found.originals, found.reconstructions])
  sheet = grid(rows, columns=len(found.originals))
  save_png(out / "reconstructions.png", sheet)
  for name in ("metrics.json", "reconstructions.json"):  # the npz's settings, too
    part = out / f".{name}.part"
    part.write_text(json.dumps(report, indent=1))
    part.rename(out / name)
  shown = "  ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
  print(
    f"{found.images} images, {report['skipped']} skipped: {shown}\n"
    f"{out}/reconstructions.npz  {out}/originals.npz  {out}/reconstructions.png"
  )
