"""Recipes of the tokenizer on the quickstart's digits, judged by what comes after.

llamagen quickstart --workdir=quickstart
python -m benchmarks.tokenizers --quickstart=quickstart --out=tokenizers [--seeds=3]

Every arm trains a tokenizer, extracts the digits' codes, and trains a small transformer
on them. Prints PSNR, use of the codebook and edge energy of reconstructed test digits
(share of the originals' Laplacian energy), the Frechet distance of reconstructions to
originals in a classifier's features, and the share of sampled digits that the
classifier reads as the class asked for. No arm has a perceptual term: its weights are
not at hand. What is done stays in --out, so that a stopped run goes on.
"""

import argparse
from collections.abc import Callable
import functools
import importlib
import json
import pathlib

import ml_collections
import numpy as np

from llamagen_jax.commands import quickstart
from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.data.images import CenterImage, ImageDecoder
from llamagen_jax.data.loader import epoch_batches
from llamagen_jax.data.sources import open_source
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.evaluation.statistics import frechet_distance
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sampling.sample import sample
from llamagen_jax.storage import write_json
from llamagen_jax.training import train_gpt, train_tokenizer
from llamagen_jax.weights import bundle

SAMPLES, BATCH = 1000, 100
COLUMNS = ("psnr", "usage", "edges", "frechet", "agreement")


def published(config: ml_collections.ConfigDict) -> None:
  """Leaves the recipe as it is: PatchGAN with the hinge loss."""


def perturbed(config: ml_collections.ConfigDict) -> None:
  config.codebook.perturbed_images = 0.1


def vqgan_plus(config: ml_collections.ConfigDict) -> None:
  config.loss.update(reconstruction_weight=4.0, lecam_weight=0.001)
  # One halving: the discriminator's logits are 16x16.
  config.discriminator.update(kind="blurpool", layers=1)
  config.optimizer.update(ema=0.98, b2=0.999, weight_decay=1e-4)


def ibq(config: ml_collections.ConfigDict) -> None:
  config.model.update(
    quantizer="ibq", l2_norm=True, entropy_ratio=0.05, codebook_dim=32
  )
  # As published, without either, 4 % of 2048 rows are in use after 300 steps, from
  # k-means alone 32 %, with both 99.6 %.
  config.codebook.init = "kmeans"
  config.loss.update(generator="non-saturating", lecam_weight=0.05)
  config.guard = {"skip_nonfinite": True}


# Name: rows of the codebook, change of the config.
ARMS: dict[str, tuple[int, Callable]] = {
  "published": (128, published), "perturbed": (128, perturbed),
  "vqgan-plus": (128, vqgan_plus), "ibq": (128, ibq),
  "published, 2048": (2048, published), "ibq, 2048": (2048, ibq),
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quickstart", default="quickstart", type=pathlib.Path)
  parser.add_argument("--out", default="tokenizers", type=pathlib.Path)
  parser.add_argument("--seeds", default=3, type=int)
  parser.add_argument("--steps", default=600, type=int, help="of a tokenizer")
  parser.add_argument("--gpt-steps", default=500, type=int)
  parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
  args = parser.parse_args()
  real = {s: quickstart.load_digits(args.quickstart, s) for s in ("train", "test")}
  read = functools.partial(classify, fit_classifier(*real["train"], epochs=6, seed=0))
  print("| recipe | PSNR | usage | edge energy | Frechet | agreement |")
  print("|---|---|---|---|---|---|")
  for arm in args.arms:
    rows = [run(arm, seed, args, read) for seed in range(args.seeds)]
    cells = [summary([row[name] for row in rows]) for name in COLUMNS]
    print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def summary(values: list[float]) -> str:
  """Returns mean and standard deviation."""
  return f"{np.mean(values):.3g} +- {np.std(values):.2g}"


def run(arm: str, seed: int, args: argparse.Namespace, read: Callable) -> dict:
  """Trains and measures an arm, where that is not done yet."""
  folder = args.out.resolve() / f"{''.join(filter(str.isalnum, arm))}-{seed}"
  path = folder / "scores.json"
  if path.exists():
    return json.loads(path.read_text())
  folder.mkdir(parents=True, exist_ok=True)
  digits = folder / "digits"  # where the quickstart's steps look for them
  if not digits.exists():
    digits.symlink_to((args.quickstart / "digits").resolve())
  train_tokenizer.train(tokenizer_config(arm, seed, args, digits), folder / "tokenizer")
  scores = measure(folder, read)
  for split in ("train", "val"):
    quickstart.extract_digits(folder, split, quickstart.FULL)
  train_gpt.train(gpt_config(ARMS[arm][0], seed, args, folder), folder / "gpt")
  asked = np.arange(SAMPLES) % 10
  tokenizer, gpt = (
    bundle.load_tokenizer(folder / "tokenizer" / "bundle"),
    bundle.load_gpt(folder / "gpt" / "bundle"),
  )
  images = sample(gpt, tokenizer, asked, batch_size=BATCH)
  scores["agreement"] = float(np.mean(read(images)[0] == asked))
  write_json(path, scores)
  return scores


def tokenizer_config(
  arm: str, seed: int, args: argparse.Namespace, digits: pathlib.Path
) -> ml_collections.ConfigDict:
  module = importlib.import_module("llamagen_jax.configs.vq_digits")
  rows, change = ARMS[arm]
  config = module.get_config(f"gan,rows={rows}")
  change(config)
  config.data.update(
    source=f"folder:{digits}/train", eval_source=f"folder:{digits}/val"
  )
  config.loss.disc_start = args.steps // 2
  config.loss.disc_warmup_steps = args.steps // 12
  config.run.update(steps=args.steps, seed=seed)
  return config


def gpt_config(
  rows: int, seed: int, args: argparse.Namespace, folder: pathlib.Path
) -> ml_collections.ConfigDict:
  config = importlib.import_module("llamagen_jax.configs.c2i_digits").get_config()
  codes = folder / "codes"
  config.data.update(codes=f"{codes}/train", eval_codes=f"{codes}/val")
  config.model.vocab_size = rows
  config.run.update(steps=args.gpt_steps, seed=seed)
  config.optimizer.warmup_steps = min(50, args.gpt_steps // 10)
  return config


def measure(folder: pathlib.Path, read: Callable) -> dict[str, float]:
  """Returns the scores of reconstructed test digits."""
  tokenizer = bundle.load_tokenizer(folder / "tokenizer" / "bundle")
  source, mesh, kept = open_source(f"folder:{folder}/digits/test"), make_mesh(), []
  transform = CenterImage(quickstart.SIDE, ImageDecoder(quickstart.SIDE))
  batches = epoch_batches(source, transform, 50 * mesh.size, mesh)
  found = reconstruct(
    tokenizer.config, tokenizer.params, batches, shown=1,
    keep=lambda *pair: kept.append(pair),
  )  # fmt: skip
  originals, made = (np.concatenate(part) for part in zip(*kept, strict=True))
  return {
    "psnr": found.psnr,
    "usage": found.usage,
    "edges": edge_energy(made) / edge_energy(originals),
    "frechet": frechet_distance(read(made)[1], read(originals)[1]),
  }


def edge_energy(images: np.ndarray) -> float:
  """Returns the mean square of the Laplacian of uint8 images [N, H, W, 3]."""
  x = images[..., 0].astype(np.float64)
  centre = x[:, 1:-1, 1:-1]
  around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
  return float(np.mean((around - 4 * centre) ** 2))


if __name__ == "__main__":
  main()
