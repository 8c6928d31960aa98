"""Encodes and decodes a source of images, and measures the reconstructions.

Writes reconstructions.npz and originals.npz (`arr_0`, uint8, in the source's order), a
grid of images and metrics.json; with --protocol also rFID, in scores.json.

llamagen reconstruct --tokenizer=vq16/bundle --source=folder:/data/val \\
    --image-size=256 --out=reconstructions
"""

from collections.abc import Iterator, Sequence
import dataclasses
import tempfile
from typing import Any

from etils import epath
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
from llamagen_jax.storage import user_path, write_json
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


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A measured tokenizer; the report and the scores are of host 0."""

  tokenizer: bundle.Tokenizer
  found: Reconstruction
  report: dict[str, Any]  # metrics and all they depend on
  scores: dict[str, Any] | None  # of --protocol


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "reconstruct", argv, __doc__)
  hosts.initialize_distributed(args)
  run(args)


def run(args: Options) -> Outcome:
  """Measures a tokenizer and writes the files; all hosts call this."""
  if args.protocol and not args.inception:
    raise UserError(f"--protocol={args.protocol} needs --inception")
  mesh = make_mesh()
  tokenizer, source = (
    bundle.load_tokenizer(args.tokenizer, mesh),
    open_source(args.source),
  )
  downsample = tokenizer.config.downsample
  if args.image_size % downsample:
    raise UserError(
      f"--image-size={args.image_size} is not a multiple of the downsampling"
      f" {downsample} of --tokenizer={args.tokenizer}"
    )
  evaluate = _evaluator(args, len(source)) if args.protocol else None
  out = user_path(args.out)
  if jax.process_index() == 0:
    out.mkdir(parents=True, exist_ok=True)
  files = [_ImageFile(_written_side(args)) for _ in SETS]
  found = _reconstruct(args, mesh, tokenizer, source, files)
  report = {
    **found.metrics,
    "images": found.images,
    "skipped": len(source) - found.images,
    "image_size": args.image_size,
    "source": args.source,
    "tokenizer": tokenizer.identity,
    "tokenizer_config": dataclasses.asdict(tokenizer.config),
  }
  if jax.process_index() == 0:
    _write(out, found, report, files)
  multihost_utils.sync_global_devices("reconstructed")
  scores = _score(evaluate, out) if evaluate else None
  return Outcome(tokenizer, found, report, scores)


def _reconstruct(args: Options, mesh, tokenizer, source, files) -> Reconstruction:
  """Runs the tokenizer over the source; host 0 fills the two files of images."""
  lpips_params = None
  if args.lpips:
    lpips_params = jax.device_put(load_lpips(args.lpips), replicated(mesh))
  # Published scores are of images as stored.
  ignore_exif = args.ignore_exif or args.protocol not in (None, "", "custom")
  decoder = ImageDecoder(args.min_side, args.background, ignore_exif)
  transform = CenterImage(args.image_size, decoder)
  batches = epoch_batches(source, transform, args.batch_size * mesh.size, mesh)
  main_host = jax.process_index() == 0
  with tqdm.tqdm(
    total=len(source), desc="reconstruct", unit="image", dynamic_ncols=True,
    disable=not main_host,
  ) as bar:  # fmt: skip

    def keep(*pair: np.ndarray) -> None:
      bar.update(len(pair[0]))
      if main_host:
        for file, images in zip(files, pair, strict=True):
          file.add(images)

    return reconstruct(
      tokenizer.config, tokenizer.params, batches, args.shown, lpips_params, keep
    )


def _score(evaluate: score.Evaluator, out: epath.Path) -> dict[str, Any] | None:
  """Compares the reconstructions with the originals, and writes scores.json."""
  made, originals = (
    image_sets.open_image_set("--out", out / f"{name}.npz") for name in reversed(SETS)
  )
  result = evaluate(made, originals)
  if result is not None:
    score.write(result, out / "scores.json")
    print(score.table(result))
  return result


def _written_side(args: Options) -> int:
  """Returns the side that images are written with: at most the protocol's."""
  side = PROTOCOLS[args.protocol].side if args.protocol else None
  return min(args.image_size, side or args.image_size)


def _evaluator(args: Options, count: int) -> score.Evaluator:
  """Returns the evaluator; refuses now what it would refuse after the long work."""
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


class _ImageFile:
  """Images that wait on this host's disk until their number is known."""

  def __init__(self, side: int):
    self._side, self._file = side, tempfile.TemporaryFile()  # noqa: SIM115
    self._resize = jax.jit(_resized, static_argnums=1)

  def add(self, images: np.ndarray) -> None:
    """Appends uint8 [B, H, H, 3], resized to the written side."""
    if images.shape[1] != self._side:
      images = np.asarray(self._resize(images, self._side))
    self._file.write(np.ascontiguousarray(images).data)

  def batches(self, size: int = 256) -> Iterator[np.ndarray]:
    """Yields the images again, uint8 [B, S, S, 3]."""
    self._file.flush()
    shape = (-1, self._side, self._side, 3)
    images = np.memmap(self._file, np.uint8, "r").reshape(shape)
    return (images[start : start + size] for start in range(0, len(images), size))


def _resized(images: jax.Array, side: int) -> jax.Array:
  resized = resize_bicubic(from_uint8(images), side)
  return to_uint8(resized)


def _write(
  out: epath.Path,
  found: Reconstruction,
  report: dict[str, Any],
  files: list[_ImageFile],
) -> None:
  for name, file in zip(SETS, files, strict=True):
    save_npz(out / f"{name}.npz", file.batches(), found.images, None)
  rows = np.concatenate([found.originals, found.reconstructions])
  sheet = grid(rows, columns=len(found.originals))
  save_png(out / "reconstructions.png", sheet)
  for name in ("metrics.json", "reconstructions.json"):  # the npz's settings, too
    write_json(out / name, report)
  shown = "  ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
  print(
    f"{found.images} images, {report['skipped']} skipped: {shown}\n"
    f"{out}/reconstructions.npz  {out}/originals.npz  {out}/reconstructions.png"
  )
