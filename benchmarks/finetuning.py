"""A model of the digits 0 to 7 finetuned to all ten, and to emoji.

llamagen quickstart --workdir=quickstart
llamagen quickstart --emoji --workdir=quickstart_emoji
python -m benchmarks.finetuning --digits=quickstart --emoji=quickstart_emoji

All codes are those of the emoji quickstart's tokenizer. The start is trained on eight
classes; then it gets a class table of another size, and all weights are trained, or
adapters and the table (LoRA), or the table alone, beside a model that starts from
nothing and takes as many steps. Digits: share of sampled ones that a classifier of
real digits reads as the class asked for. Emoji by group: loss on held-out ones. Writes
a grid of samples of every arm. What is done stays in --out, so that a stopped run goes
on.
"""

import argparse
from collections.abc import Sequence
import importlib
import pathlib

import ml_collections
import numpy as np

from llamagen_jax.commands import cli, quickstart
from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.images import grid, save_png
from llamagen_jax.sampling.sample import sample
from llamagen_jax.training import train_gpt
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.weights import bundle

START_STEPS, STEPS = 1000, 200
SAMPLES, BATCH, SHOWN = 500, 100, 4
LORA = {"rank": 16, "alpha": 16.0, "targets": ("qkv", "out", "ffn_in", "ffn_out")}
# Name: does it begin with the digits' model, peak learning rate, config.train.
ARMS = {
  "from nothing": (False, 4e-3, {"only": "all"}),
  "all weights": (True, 2e-3, {"only": "all"}),
  "LoRA, table": (True, 4e-3, {"only": "table", "lora": LORA}),
  "table alone": (True, 4e-3, {"only": "table"}),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--digits", default="quickstart", type=pathlib.Path)
  parser.add_argument("--emoji", default="quickstart_emoji", type=pathlib.Path)
  parser.add_argument("--out", default="finetuning", type=pathlib.Path)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  tokenizer = args.emoji / "tokenizer" / "bundle"
  few = args.out / "digits_0_7"
  for split in ("train", "val"):
    link_classes(args.digits / "digits" / split, few / split, range(8))
  sets = {"few": few, "digits": args.digits / "digits", "emoji": args.emoji / "emoji"}
  for name, folder in sets.items():
    for split in ("train", "val"):
      extract(tokenizer, folder / split, args.out / "codes" / name / split)
  start = args.out / "start"
  train(config(args.out, "few", START_STEPS, 4e-3), start)

  judge = fit_classifier(
    *quickstart.load_digits(args.digits, "train"), epochs=6, seed=0
  )
  print("| | digits read as asked: 0-7 | 8, 9 | loss of held-out emoji |")
  print("|---|---|---|---|")
  read = agreement(judge, start, tokenizer, args.out / "start.png")
  print(f"| the start | {read[0]:.1%} | - | - |")
  for name, (goes_on, lr, changes) in ARMS.items():
    cells, label = [], "".join(filter(str.isalnum, name))
    for data in ("digits", "emoji"):
      folder = args.out / f"{data}_{label}"
      recipe = config(args.out, data, STEPS, lr)
      recipe.train = changes
      recipe.init_from = str(start) if goes_on else ""
      train(recipe, folder)
      if data == "digits":
        read = agreement(judge, folder, tokenizer, folder.with_suffix(".png"))
        cells += [f"{share:.1%}" for share in read]
      else:
        draw(folder, tokenizer, folder.with_suffix(".png"))
        losses = [row["eval/loss"] for row in read_rows(folder / "metrics.jsonl")
                  if "eval/loss" in row]  # fmt: skip
        cells.append(f"{losses[-1]:.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def link_classes(source: pathlib.Path, out: pathlib.Path, classes: Sequence[int]):
  """Makes a folder of some classes of another folder."""
  out.mkdir(parents=True, exist_ok=True)
  for name in map(str, classes):
    if not (out / name).exists():
      (out / name).symlink_to((source / name).resolve())


def extract(tokenizer: pathlib.Path, images: pathlib.Path, out: pathlib.Path) -> None:
  if not (out / "manifest.json").exists():
    code = cli.run([
      "extract-codes", f"--tokenizer={tokenizer}", f"--source=folder:{images}",
      "--image-size=32", f"--out={out}", "--crops=center", "--ranges=1", "--no-mirror",
      "--shards=2",
    ])  # fmt: skip
    assert code == 0, images


def config(
  out: pathlib.Path, data: str, steps: int, lr: float
) -> ml_collections.ConfigDict:
  """Returns the digits' recipe for a set of codes of the emoji's tokenizer."""
  config = importlib.import_module("llamagen_jax.configs.c2i_digits").get_config()
  codes = out / "codes" / data
  config.data.update(codes=f"{codes}/train", eval_codes=f"{codes}/val")
  config.model.update(
    vocab_size=1024, num_classes={"few": 8, "digits": 10, "emoji": 9}[data]
  )
  config.optimizer.update(lr=lr, warmup_steps=20)
  config.objective = {"code_noise": 0.5}  # few images, which are learned by heart
  config.run.update(steps=steps, eval_every=steps)
  return config


def train(recipe: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  if not (folder / "bundle" / bundle.CONFIG).exists():
    train_gpt.train(recipe, folder)


def draw(
  folder: pathlib.Path, tokenizer: pathlib.Path, path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """Samples images of all classes in turn; writes a grid, a column for a class."""
  gpt = bundle.load_gpt(folder / "bundle")
  classes = gpt.config.num_classes
  asked = np.arange(SAMPLES) % classes
  images = sample(gpt, bundle.load_tokenizer(tokenizer), asked, batch_size=BATCH)
  save_png(path, grid(images[: SHOWN * classes], columns=classes, zoom=3))
  return asked, images


def agreement(judge, folder, tokenizer, path) -> list[float]:
  """Returns the shares of 0-7 and of 8 and 9 that are read as asked; writes a grid."""
  asked, images = draw(folder, tokenizer, path)
  right = classify(judge, images)[0] == asked
  return [float(np.mean(right[part])) for part in (asked < 8, asked >= 8) if any(part)]


if __name__ == "__main__":
  main()
