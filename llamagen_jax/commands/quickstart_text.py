"""The part of `llamagen quickstart --text`: sentences to coloured digits.

Real digits are coloured and placed on coloured grounds, each with a caption in plain
English. A small T5 with fixed random weights reads the captions: it is never trained,
it only gives every word a vector that depends on the words around it. Some triples
(digit, colour, ground) never occur in training; generating them shows that the
transformer learned what the words mean.
"""

from collections.abc import Callable, Sequence
import dataclasses
import io
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from llamagen_jax.commands.classifier import classify, fit_classifier
from llamagen_jax.commands.extract_codes import Encoder, extract
from llamagen_jax.commands.extract_text import extract_text
from llamagen_jax.commands.prepare_captions import prepare
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.images import CropSet, ImageDecoder
from llamagen_jax.data.sources import open_source
from llamagen_jax.images import grid, save_npz, save_png
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.sampling.sample import sample
from llamagen_jax.storage import atomic_folder, write_json
from llamagen_jax.text.t5 import T5Config, init_t5
from llamagen_jax.text.tokens import SENTENCEPIECE, CaptionTokens
from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training import train_tokenizer as tokenizer_train
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5, save_t5

SIDE = 24  # what is cut out of the 32x32 digits: their margins would be most codes
MARGIN = 4
LARGEST_SHIFT = 1  # pixels off the middle
COLOURS = {
  "red": (225, 30, 35),
  "green": (20, 165, 60),
  "blue": (35, 50, 215),
  "white": (250, 250, 250),
}
NAMES = tuple(COLOURS)
RGB = np.array(list(COLOURS.values()), np.float32)
PAIRS = [(a, b) for a in range(len(NAMES)) for b in range(len(NAMES)) if a != b]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PHRASINGS = (
  "a {colour} {digit} on a {ground} background",
  "a {ground} image with a {colour} {digit}",
  "the number {digit} in {colour} on {ground}",
  "{colour} {digit} on {ground} paper",
  "on a {ground} ground there is a {colour} {digit}",
)
# 110 pieces of words.
T5 = T5Config(110, dim=64, layers=2, heads=4, head_dim=16, ffn_dim=128)
TOKENS = 12
# Of the features. The transformer's embedder starts with small weights; from features
# of scale 1 it learns what the words mean four times more slowly.
FEATURE_SCALE = 16
HOLD_OUT = 5  # one triple in this many never occurs in training
SHOWN = 20  # prompts of either kind in the grid
COPIES = 6  # coloured images of every digit
CLASSIFIER_EPOCHS = 6


@dataclasses.dataclass(frozen=True)
class Triple:
  """What an image shows, and the caption that says so."""

  digit: int
  pair: int  # index into PAIRS: colour of the digit, colour of the ground
  caption: str

  @property
  def unseen(self) -> bool:
    return (self.digit + self.pair) % HOLD_OUT == 0


def describe(digit: int, pair: int, rng: np.random.Generator) -> Triple:
  colour, ground = (NAMES[i] for i in PAIRS[pair])
  phrasing = PHRASINGS[rng.integers(len(PHRASINGS))]
  caption = phrasing.format(colour=colour, ground=ground, digit=WORDS[digit])
  return Triple(digit, pair, caption)


def random_triple(digit: int, unseen: bool, rng: np.random.Generator) -> Triple:
  """A random pair of colours, among those that training has or has not."""
  while True:
    triple = describe(digit, int(rng.integers(len(PAIRS))), rng)
    if triple.unseen == unseen:
      return triple


def paint(grey: np.ndarray, pair: int, rng: np.random.Generator) -> np.ndarray:
  """Grey digit [32, 32] -> uint8 [24, 24, 3] in two colours, off the middle."""
  colour, ground = (RGB[i] for i in PAIRS[pair])
  shift = rng.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, 2)
  middle = slice(MARGIN, MARGIN + SIDE)
  ink = np.roll(grey, shift, axis=(0, 1))[middle, middle, None] / 255
  return np.rint(ground * (1 - ink) + colour * ink).astype(np.uint8)


def read_colours(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images [B, H, W, 3] -> colour of the digit, colour of the ground, grey digits.

  The ground is what most pixels of the border are nearest to; the digit's colour is
  the one that, blended with the ground, explains the pixels best. The blend is the
  digit itself, uint8 [B, H, W].
  """
  x = images.astype(np.float32)
  border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], axis=1)
  nearest = np.sum((border[:, :, None] - RGB) ** 2, axis=-1).argmin(axis=-1)
  votes = [np.bincount(row, minlength=len(RGB)).argmax() for row in nearest]
  ground = np.array(votes)
  offset = x - RGB[ground][:, None, None]
  axis = RGB[None] - RGB[ground][:, None]  # [B, colours, 3]
  length = np.maximum(np.sum(axis**2, axis=-1), 1)[:, None, None]
  ink = np.einsum("bhwc,bkc->bhwk", offset, axis) / length
  ink = np.clip(ink, 0, 1)
  left = offset[..., None, :] - ink[..., None] * axis[:, None, None]
  error = np.sum(left**2, axis=(1, 2, 4))
  error[np.arange(len(x)), ground] = np.inf
  colour = error.argmin(axis=1)
  grey = np.take_along_axis(ink, colour[:, None, None, None], axis=-1)[..., 0]
  return colour, ground, np.rint(grey * 255).astype(np.uint8)


def write_images(folder: pathlib.Path, digits: pathlib.Path) -> None:
  """NAME.png and NAME.txt of painted training and validation digits."""
  if folder.exists():
    return
  rng = np.random.default_rng(0)
  with atomic_folder(folder) as part:
    for split in ("train", "val"):
      (part / split).mkdir(parents=True)
      for path in sorted((digits / split).glob("*/*.png")):
        grey = np.asarray(Image.open(path).convert("L"))
        for copy in range(COPIES):
          triple = random_triple(int(path.parent.name), False, rng)
          stem = part / split / f"{path.parent.name}-{path.stem}-{copy}"
          image = Image.fromarray(paint(grey, triple.pair, rng))
          image.save(stem.with_suffix(".png"))
          stem.with_suffix(".txt").write_text(triple.caption)


def write_t5(
  folder: pathlib.Path,
  config: T5Config,
  captions: Sequence[str],
  weights: Callable[[T5Config, CaptionTokens], Any],
) -> None:
  """Writes a T5 whose vocabulary is the captions' pieces.

  Args:
    weights: returns its parameters.
  """
  import sentencepiece

  if folder.exists():
    return
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(captions), model_writer=model, model_type="bpe",
    vocab_size=config.vocab_size, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  with atomic_folder(folder) as part:
    part.mkdir(parents=True)
    (part / SENTENCEPIECE).write_bytes(model.getvalue())
    save_t5(part, config, weights(config, CaptionTokens.load(part)))


def fixed_weights(config: T5Config, tokens: CaptionTokens) -> Any:
  """Returns random weights whose features are near the words' own vectors."""
  params = jax.device_get(unbox(init_t5(config, jax.random.key(0))))
  layers = dict(params["layers"])
  # Small queries and keys, large position biases -> a word's vector depends most on the
  # word itself, and less on its neighbours, the less the farther they are.
  layers["qkv"] = layers["qkv"] * np.array([0.3, 0.3, 1.0]).reshape(1, 1, 3, 1, 1)
  layers["out"], layers["ffn_out"] = layers["out"] / 2, layers["ffn_out"] / 2
  bias = params["position_bias"] * config.dim**0.5
  norm = params["norm"] * FEATURE_SCALE
  return params | {"layers": layers, "position_bias": bias, "norm": norm}


def run(workdir: pathlib.Path, config: str, samples: int, step, train) -> dict:
  """Runs what is not done yet and returns the measurements.

  `step` and `train` are the quickstart's own; `config` is "fast" or "".
  """
  coloured = workdir / "coloured"
  with step("images", "coloured digits on coloured grounds, with captions"):
    write_images(coloured, workdir / "digits")
  with step("tokenizer", "train the VQ tokenizer"):
    arg = ",".join(filter(None, ("coloured", config)))
    train(tokenizer_train, "vq_digits", arg, workdir / "tokenizer", {
        "source": f"folder:{coloured}/train",
        "eval_source": f"folder:{coloured}/val",
    })  # fmt: skip
  with step("text", "captions to shards, codes and features"):
    texts = sorted((coloured / "train").glob("*.txt"))
    write_t5(workdir / "t5", T5, [path.read_text() for path in texts], fixed_weights)
    for split in ("train", "val"):
      extract_pairs(workdir, coloured / split, SIDE, TOKENS)
  with step("gpt", "train the transformer on codes and features"):
    train(gpt_train, "t2i_digits", config, workdir / "gpt", {
        "codes": f"{workdir}/codes/train", "texts": f"{workdir}/features/train",
        "eval_codes": f"{workdir}/codes/val", "eval_texts": f"{workdir}/features/val",
    })  # fmt: skip
  with step("judge", "generate images of prompts, seen and unseen, and read them"):
    return judge(workdir, samples)


def extract_pairs(
  workdir: pathlib.Path, images: pathlib.Path, side: int, tokens: int
) -> None:
  """Writes caption shards, codes and features of a folder of images with captions."""
  split = images.name
  captions, codes = workdir / "captions" / split, workdir / "codes" / split
  prepare(
    f"folder:{images}", captions, keys=FieldNames(), images="", min_side=side,
    shard_count=4, workers=1,
  )  # fmt: skip
  if not (codes / "manifest.json").exists():
    spec = f"captions:{captions}"
    extract(
      Encoder(workdir / "tokenizer" / "bundle"), open_source(spec), spec, codes,
      CropSet(side, "center", (1.0,), mirror=False), shards=2, batch_size=200,
      decoder=ImageDecoder(side), max_bad_share=0.0, workers=0,
    )  # fmt: skip
  extract_text(
    workdir / "t5", captions, workdir / "features" / split, tokens=tokens,
    batch_size=512, dtype="float32",
  )  # fmt: skip


def judge(workdir: pathlib.Path, samples: int) -> dict[str, float]:
  """Samples with and without guidance, half of the prompts of unseen triples."""
  gpt = bundle.load_gpt(workdir / "gpt" / "bundle")
  tokenizer = bundle.load_tokenizer(workdir / "tokenizer" / "bundle")
  encoder = load_t5(workdir / "t5", dtype="float32")
  rng = np.random.default_rng(1)
  asked = [random_triple(i % 10, i >= samples // 2, rng) for i in range(samples)]
  prompts = [triple.caption for triple in asked]
  options = {"prompts": prompts, "text_encoder": encoder, "batch_size": 100}
  guided = sample(gpt, tokenizer, **options)
  plain = sample(gpt, tokenizer, **options, guidance_scale=1.0)

  reader = _fit_reader(workdir / "digits" / "train")
  scale = gpt.sampling.guidance_scale
  metrics = {"samples": samples, "guidance": scale}
  for name, images in (("guided", guided), ("plain", plain)):
    found = _agreement(reader, images, asked)
    metrics |= {f"{name}/{key}": value for key, value in found.items()}
  _write_grid(workdir / "samples.png", asked, plain, guided, scale)
  save_npz(
    workdir / "samples.npz", [guided], samples, np.array([t.digit for t in asked])
  )
  prompts = [dataclasses.asdict(t) | {"unseen": t.unseen} for t in asked]
  write_json(workdir / "prompts.json", prompts)
  return metrics


def _fit_reader(digits: pathlib.Path):
  """A classifier of real, uncoloured training digits."""
  paths = sorted(digits.glob("*/*.png"))
  images = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
  labels = np.array([int(p.parent.name) for p in paths])
  return fit_classifier(images, labels, epochs=CLASSIFIER_EPOCHS, seed=0)


def _agreement(reader, images, asked: list[Triple]) -> dict[str, float]:
  colour, ground, grey = read_colours(images)
  grey = np.pad(grey, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
  read, _ = classify(reader, np.repeat(grey[..., None], 3, axis=-1))
  digit_right = read == np.array([t.digit for t in asked])
  wanted = np.array([PAIRS[t.pair] for t in asked])
  colours_right = (colour == wanted[:, 0]) & (ground == wanted[:, 1])
  unseen = np.array([t.unseen for t in asked])
  return {
    "digit": float(digit_right.mean()),
    "colours": float(colours_right.mean()),
    "seen_all": float((digit_right & colours_right)[~unseen].mean()),
    "unseen_all": float((digit_right & colours_right)[unseen].mean()),
  }


def _write_grid(path, asked: list[Triple], plain, guided, scale: float) -> None:
  """Per prompt the image without guidance and, next to it, the one with it."""
  seen = [i for i, t in enumerate(asked) if not t.unseen][:SHOWN]
  unseen = [i for i, t in enumerate(asked) if t.unseen][:SHOWN]
  rows = [*seen, *unseen]
  pairs = [np.concatenate([plain[i], guided[i]], axis=1) for i in rows]
  labels = [("unseen: " if asked[i].unseen else "") + asked[i].caption for i in rows]
  sheet = grid(np.stack(pairs), columns=4, labels=labels, zoom=6)
  save_png(path, sheet)


def print_table(m: dict[str, float], workdir: pathlib.Path, seconds: float) -> None:
  print(f"\n{m['samples']:.0f} images             guidance 1   {m['guidance']:g}")
  for key, name in (
    ("digit", "digit right"),
    ("colours", "both colours right"),
    ("seen_all", "all three, seen triples"),
    ("unseen_all", "all three, unseen triples"),
  ):
    print(f"{name:26} {m[f'plain/{key}']:>10.1%} {m[f'guided/{key}']:>8.1%}")
  print(f"this run {seconds:.0f} s\n\nLook at {workdir}/samples.png")
