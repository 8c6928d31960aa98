"""Recipes of the tokenizer on small pictures, judged by what comes after.

python -m benchmarks.tokenizers --pictures=digits --out=tokenizers [--seeds 0 1 2]
python -m benchmarks.tokenizers --pictures=emoji --out=tokenizers_emoji

Every arm trains a tokenizer, extracts the pictures' codes, and trains a small
transformer on them. Prints PSNR, use of the codebook and edge energy of reconstructed
pictures that were held out (share of the originals' Laplacian energy), the Frechet
distance of reconstructions to originals in a judge's features, and the share of sampled
pictures that the judge reads as the class asked for. No arm has a perceptual term: its
weights are not at hand. What is done stays in --out, so that a stopped run goes on, and
several runs may fill the seeds of one table.
"""

import argparse
from collections.abc import Callable
import importlib
import json
import pathlib

import ml_collections
import numpy as np

from benchmarks import pictures
from llamagen_jax.commands.extract_codes import Encoder, extract
from llamagen_jax.data.images import ImageDecoder
from llamagen_jax.data.sources import open_source
from llamagen_jax.evaluation.reconstruction import reconstruct
from llamagen_jax.evaluation.statistics import frechet_distance
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


# Name: change of the config.
RECIPES: dict[str, Callable] = {
  "published": published, "perturbed": perturbed, "vqgan-plus": vqgan_plus, "ibq": ibq
}  # fmt: skip
# Rows of the codebook: digits have few parts, drawings in colour many.
ROWS = {"digits": 128, "emoji": 512}
ARMS = (*RECIPES, "published, 2048", "ibq, 2048")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--pictures", default="digits", choices=list(ROWS))
  parser.add_argument("--out", default="tokenizers", type=pathlib.Path)
  parser.add_argument("--seeds", nargs="*", default=[0, 1, 2], type=int)
  parser.add_argument("--steps", default=600, type=int, help="of a tokenizer")
  parser.add_argument("--gpt-steps", default=500, type=int)
  parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
  args = parser.parse_args()
  shown = getattr(pictures, args.pictures)(args.out.resolve())
  print("| recipe | PSNR | usage | edge energy | Frechet | agreement |")
  print("|---|---|---|---|---|---|")
  for arm in args.arms:
    rows = [run(arm, seed, args, shown) for seed in args.seeds]
    cells = [summary([row[name] for row in rows]) for name in COLUMNS]
    print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def summary(values: list[float]) -> str:
  """Returns mean and standard deviation."""
  return f"{np.mean(values):.3g} +- {np.std(values):.2g}"


def run(
  arm: str, seed: int, args: argparse.Namespace, shown: pictures.Pictures
) -> dict[str, float]:
  """Trains and measures an arm, where that is not done yet."""
  folder = args.out.resolve() / f"{''.join(filter(str.isalnum, arm))}-{seed}"
  path = folder / "scores.json"
  if path.exists():
    return json.loads(path.read_text())
  folder.mkdir(parents=True, exist_ok=True)
  recipe, _, rows = arm.partition(", ")
  rows = int(rows or ROWS[args.pictures])
  train_tokenizer.train(
    tokenizer_config(recipe, rows, seed, args, shown), folder / "tokenizer"
  )
  tokenizer = bundle.load_tokenizer(folder / "tokenizer" / "bundle")
  scores = measure(tokenizer, shown)
  for split in ("train", "val"):
    extract_codes(folder, shown, split)
  train_gpt.train(gpt_config(rows, seed, args, shown, folder), folder / "gpt")
  asked = np.arange(SAMPLES) % len(shown.classes)
  gpt = bundle.load_gpt(folder / "gpt" / "bundle")
  images = sample(gpt, tokenizer, asked, batch_size=BATCH)
  scores["agreement"] = float(np.mean(shown.read(images)[0] == asked))
  write_json(path, scores)
  return scores


def tokenizer_config(
  recipe: str, rows: int, seed: int, args: argparse.Namespace, shown: pictures.Pictures
) -> ml_collections.ConfigDict:
  module = importlib.import_module("llamagen_jax.configs.vq_digits")
  config = module.get_config(f"gan,rows={rows}")
  RECIPES[recipe](config)
  config.data.update(
    source=f"folder:{shown.folder}/train",
    eval_source=f"folder:{shown.folder}/val",
    max_resize=shown.max_resize,
  )
  config.loss.disc_start = args.steps // 2
  config.loss.disc_warmup_steps = args.steps // 12
  config.run.update(steps=args.steps, seed=seed)
  return config


def extract_codes(folder: pathlib.Path, shown: pictures.Pictures, split: str) -> None:
  out, spec = folder / "codes" / split, f"folder:{shown.folder}/{split}"
  if not (out / "manifest.json").exists():
    extract(
      Encoder(folder / "tokenizer" / "bundle"), open_source(spec), spec, out,
      shown.crops, shards=2, batch_size=40, decoder=ImageDecoder(16),
      max_bad_share=0.0, workers=0,
    )  # fmt: skip


def gpt_config(
  rows: int, seed: int, args: argparse.Namespace, shown: pictures.Pictures,
  folder: pathlib.Path,
) -> ml_collections.ConfigDict:  # fmt: skip
  config = importlib.import_module("llamagen_jax.configs.c2i_digits").get_config()
  codes = folder / "codes"
  config.data.update(codes=f"{codes}/train", eval_codes=f"{codes}/val")
  config.model.update(vocab_size=rows, num_classes=len(shown.classes))
  config.run.update(steps=args.gpt_steps, seed=seed)
  config.optimizer.warmup_steps = min(50, args.gpt_steps // 10)
  return config


def measure(tokenizer: bundle.Tokenizer, shown: pictures.Pictures) -> dict[str, float]:
  """Returns the scores of reconstructed pictures that were held out."""
  kept, parts = [], np.array_split(shown.held_out, -(-len(shown.held_out) // BATCH))
  batches = ({"image": x, "weight": np.ones(len(x), np.float32)} for x in parts)
  found = reconstruct(
    tokenizer.config, tokenizer.params, batches, shown=0,
    keep=lambda _, made: kept.append(made),
  )  # fmt: skip
  made, originals = np.concatenate(kept), shown.held_out
  return {
    "psnr": found.psnr,
    "usage": found.usage,
    "edges": edge_energy(made) / edge_energy(originals),
    "frechet": frechet_distance(shown.read(made)[1], shown.read(originals)[1]),
  }


def edge_energy(images: np.ndarray) -> float:
  """Returns the mean square of the Laplacian of uint8 images [N, H, W, 3]."""
  x = images.astype(np.float64)
  centre = x[:, 1:-1, 1:-1]
  around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
  return float(np.mean((around - 4 * centre) ** 2))


if __name__ == "__main__":
  main()
