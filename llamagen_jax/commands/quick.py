"""`llamagen evaluate --quick`: do weights do what is published of them, in minutes.

Samples 5 000 images of random labels and reconstructs 1 000, measures what can be
compared at such numbers, and prints a table of passes and failures. With --digits the
classifier of a quickstart's digits judges in Inception's place.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from llamagen_jax.commands import quickstart, sample, sampling_flags
from llamagen_jax.commands.classifier import fit_classifier, read_digits
from llamagen_jax.data.images import CenterImage, ImageDecoder
from llamagen_jax.data.loader import epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import RunFailed, UserError
from llamagen_jax.evaluation import quick, statistics
from llamagen_jax.evaluation.cached_features import CachedImageMap, Extractor
from llamagen_jax.evaluation.image_sets import ImageSet, open_image_set
from llamagen_jax.evaluation.protocols import GFID, published_model
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.evaluation.score import MAX_REFERENCE, SPLIT
from llamagen_jax.options import option
from llamagen_jax.parallel.mesh import make_data_mesh, make_mesh
from llamagen_jax.storage import read_json, user_path, write_json, write_text
from llamagen_jax.weights import bundle
from llamagen_jax.weights.inception import load_inception
from llamagen_jax.weights.published import PUBLISHED, published_tokenizers

SAMPLES, RECONSTRUCTIONS = 5000, 1000
PUBLISHED_SIDE = 256  # of the images that tokenizers' figures are of
REPORT = "quick.json"
OF_SAMPLES = ("IS", "precision", "FID")
OF_RECONSTRUCTIONS = ("psnr", "ssim_lg")

# Images -> features [N, C] and logits [N, K], on host 0; two empty arrays elsewhere.
Judge = Callable[[ImageSet, str], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickOptions:
  """A quick check of weights."""

  quick: bool = option(
    "sample 5 000 images and reconstruct 1 000, and compare what can be compared with"
    " published figures; takes --gpt, --tokenizer and --out, a folder", False,
  )  # fmt: skip
  source: str | None = option(
    "images to reconstruct, of which the first 1 000 count", None, unit="KIND:PATH"
  )
  figures: str | None = option(
    "quick.json of weights that are right, to compare with in place of published"
    " figures", None, unit="FILE",
  )  # fmt: skip
  digits: str | None = option(
    "workdir of a quickstart: its classifier judges in Inception's place, and its test"
    " digits are reference and source", None, unit="FOLDER",
  )  # fmt: skip


def run(args: Any) -> None:
  """Measures, prints the table and writes it; fails where a figure is off."""
  _check(args)
  out, missing = user_path(args.out), {}
  found: dict[str, tuple[float, int]] = {}
  mesh = make_mesh()
  tokenizer = bundle.load_tokenizer(args.tokenizer, mesh)
  source = f"folder:{args.digits}/digits/test" if args.digits else args.source
  if source:
    found |= _reconstructed(tokenizer, source, args.batch_size, mesh)
  else:
    missing |= dict.fromkeys(OF_RECONSTRUCTIONS, "needs --source, images to keep")
  settings = None
  if args.gpt:
    samples = _sample(args, out)
    settings = samples.settings
    _judge(args, samples, found, missing)
  else:
    missing |= dict.fromkeys(OF_SAMPLES, "needs --gpt, a bundle of a transformer")
  if jax.process_index() != 0:
    return
  model, expected, sampling = _expected(args, tokenizer, settings)
  rows = quick.compare(found, expected, missing)
  if settings and sampling:
    rows.append(quick.compare_settings(settings["sampling"], sampling))
  report = {
    "figures": {name: value for name, (value, _) in found.items()},
    "sampling": settings and settings["sampling"],
    "compared_with": model,
    "rows": [dataclasses.asdict(row) for row in rows],
  }
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / REPORT, report)
  text = f"compared with {model or 'nothing: no figures are known'}\n\n"
  text += quick.table(rows)
  write_text(out / "quick.md", text + "\n")
  print(f"{text}\n\nwritten to {out}")
  failed = [row.title for row in rows if row.verdict == quick.FAIL]
  if failed:
    raise RunFailed(f"--quick: {', '.join(failed)} off; see {out}/quick.md")


def _check(args: Any) -> None:
  """Refuses before any work what could not be followed."""
  for name in ("tokenizer", "out"):
    if not getattr(args, name):
      raise UserError(f"--quick needs --{name}")
  for name in ("samples", "sweep", "protocol"):
    if getattr(args, name):
      raise UserError(f"--quick makes its own samples of random labels: no --{name}")
  if args.model and args.model not in PUBLISHED:
    raise UserError(f"--model={args.model}: expected one of {', '.join(PUBLISHED)}")
  if args.digits and not pathlib.Path(args.digits, "digits", "test").is_dir():
    raise UserError(f"--digits={args.digits}: no digits/test: run llamagen quickstart")
  if args.inception and not user_path(args.inception).exists():
    raise UserError(f"--inception={args.inception}: no such file or folder")
  if args.figures:
    _read_figures(args.figures)


def _read_figures(path: str) -> dict[str, Any]:
  """Returns an earlier report of --quick."""
  file = user_path(path)
  if not file.is_file():
    raise UserError(f"--figures={path}: no such file")
  report = read_json(file)
  figures = report.get("figures") if isinstance(report, dict) else None
  if not isinstance(figures, dict) or not figures.keys() <= quick.FIGURES.keys():
    raise UserError(f"--figures={path}: expected a {REPORT} of evaluate --quick")
  return report


def _reconstructed(
  tokenizer: bundle.Tokenizer, spec: str, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, tuple[float, int]]:
  """Returns the figures of the first images of a source, as stored, centre crops."""
  source = _First(open_source(spec))
  side = _side(source, tokenizer.config.downsample)
  transform = CenterImage(side, ImageDecoder(ignore_exif=True))
  batches = epoch_batches(source, transform, batch_size * mesh.size, mesh)
  kept = reconstruct(tokenizer.config, tokenizer.params, batches, shown=1)
  return {name: (getattr(kept, name), kept.images) for name in OF_RECONSTRUCTIONS}


class _First:
  """The first samples of a source."""

  def __init__(self, source: Any):
    self._source, self._length = source, min(len(source), RECONSTRUCTIONS)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Any:
    return self._source[index]


def _side(source: Any, downsample: int) -> int:
  """Returns the side of the crops: 256, or less where images are as small as digits."""
  first = next((record for record in source if not record.problem), None)
  if first is None:
    raise UserError("--source: none of its images can be read")
  smallest = min(ImageDecoder()(first).size)
  return min(PUBLISHED_SIDE, smallest) // downsample * downsample


def _sample(args: Any, out: epath.Path) -> ImageSet:
  """Returns samples of random labels, or those that an earlier run made."""
  path = out / "samples.npz"
  sample.run(
    sample.Options(
      gpt=args.gpt, tokenizer=args.tokenizer, out=str(path), seed=args.seed,
      fid_batch=args.count or SAMPLES, labels="uniform", batch_size=args.batch_size,
      **sampling_flags.given(args),
    )
  )  # fmt: skip
  return open_image_set("--quick", path)


def _judge(
  args: Any,
  samples: ImageSet,
  found: dict[str, tuple[float, int]],
  missing: dict[str, str],
) -> None:
  """Adds the figures of samples, or what they need."""
  if not args.digits and not args.inception:
    text = "needs --inception, pt_inception-2015-12-05-6726825d.pth"
    missing |= dict.fromkeys(OF_SAMPLES, text)
    return
  judge = _digits_judge(args.digits) if args.digits else _inception_judge(args)
  features, logits = judge(samples, "samples")
  place = f"{args.digits}/digits/test" if args.digits else args.reference
  reference = open_image_set("--reference", place, as_stored=True) if place else None
  theirs = None
  if reference is not None and reference.count:
    theirs = judge(reference, "reference")[0]
  if jax.process_index() != 0:
    return
  count = samples.count
  found["IS"] = statistics.inception_score(logits, SPLIT), count
  if args.digits:  # Inception's classes have an order of their own
    found["class_match"] = float(np.mean(logits.argmax(1) == samples.labels)), count
  if reference is None:
    text = "needs --reference, VIRTUAL_imagenet256_labeled.npz"
    missing |= dict.fromkeys(("precision", "FID"), text)
    return
  if theirs is not None:
    precision, _ = statistics.precision_recall(theirs[:MAX_REFERENCE], features)
    found["precision"] = precision, count
  if "mu" in reference.statistics and not args.digits:
    gaussian = reference.statistics["mu"], reference.statistics["sigma"]
  else:
    gaussian = statistics.Moments.of(theirs).gaussian
  found["FID"] = quick.extrapolated_fid(features, gaussian), count


def _inception_judge(args: Any) -> Judge:
  values = CachedImageMap(make_data_mesh(), args.inception_batch, args.cache)
  extract = Extractor(load_inception(args.inception), values)

  def judge(images: ImageSet, label: str) -> tuple[np.ndarray, np.ndarray]:
    features = extract(images, label).get("pool", np.empty((0, 0)))
    return features, extract.logits(features) if len(features) else features

  return judge


def _digits_judge(workdir: str) -> Judge:
  images, labels = quickstart.load_digits(pathlib.Path(workdir), "train")
  epochs = quickstart.FULL.classifier_epochs
  params = fit_classifier(images, labels, epochs=epochs, seed=0)

  def judge(images: ImageSet, label: str) -> tuple[np.ndarray, np.ndarray]:
    logits, features = read_digits(params, images.batches(500))
    return features, logits

  return judge


def _expected(
  args: Any, tokenizer: bundle.Tokenizer, settings: dict[str, Any] | None
) -> tuple[str, dict[str, float], dict[str, Any]]:
  """Returns whose figures they are, the figures, and the sampling they are of."""
  if args.figures:
    report = _read_figures(args.figures)
    return args.figures, report["figures"], report.get("sampling") or {}
  known = published_tokenizers(tokenizer.config)
  # Of two that have one shape it is not known which it is.
  name, figures = next(iter(known.items())) if len(known) == 1 else ("", {})
  expected, sampling = dict(figures), {}
  model = args.model or published_model(GFID[0], settings)
  if model and settings:
    expected |= PUBLISHED[model].scores
    sampling = json.loads(json.dumps(dataclasses.asdict(PUBLISHED[model].sampling)))
  return " and ".join(filter(None, (name, model))), expected, sampling
