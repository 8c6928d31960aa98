"""Edits of the quickstart's digits, judged by a classifier of real digits.

llamagen quickstart --workdir=quickstart
python -m benchmarks.editing --quickstart=quickstart [--out=editing.png]

Half of every test digit is hidden and drawn anew, given its class: the share of results
that the classifier reads as that class, and the nats that the transformer finds in a
kept code, less is better. Then variations of a growing strength: how far they are from
their source, in grey levels. Writes a grid.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import GPT
from llamagen_jax.commands import quickstart
from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.images import grid, save_png, to_uint8
from llamagen_jax.sampling.edit import Canvas, EditSettings, feather, redrawn_cells
from llamagen_jax.sampling.known_codes import KnownCodes
from llamagen_jax.sampling.sample import (
  Labels,
  SamplingJob,
  sample_image_codes,
)
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.weights import bundle

HALVES = {
  "lower": np.s_[16:, :], "upper": np.s_[:16, :], "left": np.s_[:, :16],
}  # fmt: skip
CANDIDATES = (1, 4, 16)
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
BATCH, SHOWN = 50, 10


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--quickstart", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("editing.png"))
  args = parser.parse_args()
  gpt = bundle.load_gpt(args.quickstart / "gpt" / "bundle")
  tokenizer = bundle.load_tokenizer(args.quickstart / "tokenizer" / "bundle")
  judge = fit_classifier(
    *quickstart.load_digits(args.quickstart, "train"), epochs=10, seed=0
  )
  images, labels = quickstart.load_digits(args.quickstart, "test")
  print(
    f"real test digits: {100 * agreement(judge, images, labels):.1f} % read right\n"
  )
  rng = np.random.default_rng(0)
  shown = [int(rng.choice(np.flatnonzero(labels == digit))) for digit in range(SHOWN)]
  sheet, results = [images[shown]], {}
  print("| hidden half | candidates | read as the class | nats a kept code |")
  print("|---|---|---|---|")
  for half, where in HALVES.items():
    hidden = np.zeros(images.shape[1:3], bool)
    hidden[where] = True
    sheet.append(np.where(hidden[..., None], np.uint8(128), images[shown]))
    for count in CANDIDATES:
      settings = EditSettings(candidates=count)
      edited, codes, known = edit_all(gpt, tokenizer, images, hidden, labels, settings)
      share = agreement(judge, edited, labels)
      nats = surprise(gpt, codes, known, labels)
      print(f"| {half} | {count} | {100 * share:.1f} % | {nats:.2f} |", flush=True)
      results[f"{half}_{count}"] = {"agreement": share, "nats": nats}
    sheet.append(edited[shown])
  print("\n| strength | distance to the source | read as the class |")
  print("|---|---|---|")
  everywhere = np.ones(images.shape[1:3], bool)
  for strength in STRENGTHS:
    settings = EditSettings(strength=strength, candidates=4)
    edited, _, _ = edit_all(gpt, tokenizer, images, everywhere, labels, settings)
    distance = float(np.abs(edited.astype(int) - images).mean())
    share = agreement(judge, edited, labels)
    print(f"| {strength} | {distance:.1f} | {100 * share:.1f} % |", flush=True)
    results[f"strength_{strength}"] = {"distance": distance, "agreement": share}
    if strength in (0.25, 0.75):
      sheet.append(edited[shown])
  save_png(args.out, grid(np.concatenate(sheet), SHOWN, zoom=2))
  print(json.dumps(results))


def edit_all(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  images: np.ndarray,
  hidden: np.ndarray,
  labels: np.ndarray,
  settings: EditSettings,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Edits every image with one mask; returns images, codes and which were known."""
  count, scale = len(images), tokenizer.config.downsample
  canvases = [Canvas(image, hidden) for image in images]
  seen = np.stack([canvas.seen(settings) for canvas in canvases])
  codes = np.asarray(tokenizer.encode(seen)).reshape(count, -1)
  redrawn = redrawn_cells(canvases[0].hidden_cells(scale), settings, 0, count)
  known = ~redrawn.reshape(count, -1)
  job = SamplingJob(
    Labels(labels.astype(np.int32)),
    dataclasses.replace(gpt.sampling, guidance_scale=3.0, top_p=0.8),
    0, BATCH, images.shape[1], KnownCodes(codes, known, settings.candidates),
  )  # fmt: skip
  codes = sample_image_codes(gpt, tokenizer, job, Timings())
  drawn = tokenizer.decode(codes.reshape(-1, *gpt.config.grid_hw))
  put_back = [
    canvas.put_back(image[None], feather(scale))[0]
    for canvas, image in zip(canvases, np.asarray(to_uint8(drawn)), strict=True)
  ]
  return np.stack(put_back), codes, known


def agreement(judge, images: np.ndarray, labels: np.ndarray) -> float:
  return float(np.mean(classify(judge, images)[0] == labels))


def surprise(gpt: bundle.Transformer, codes, known, labels) -> float:
  """Returns the mean of -log p of the kept codes, given all codes before them."""

  @jax.jit
  def log_p(codes, labels):
    logits = GPT(gpt.config).apply({"params": gpt.params}, codes, labels)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], 2)[..., 0]

  found = [
    log_p(codes[i : i + BATCH], labels[i : i + BATCH])
    for i in range(0, len(codes), BATCH)
  ]
  return float(-np.concatenate(found)[known].mean())


if __name__ == "__main__":
  main()
