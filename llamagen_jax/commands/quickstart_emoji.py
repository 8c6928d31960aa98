"""The part of `llamagen quickstart --emoji`: names to emoji, in colour.

The drawings of OpenMoji with the names that Unicode gives them -> VQ tokenizer -> text
encoder -> codes and features of the names -> transformer -> emoji, within a budget of
minutes. One skin tone of every person and some colours of shapes never occur in
training. A network that knows real emoji only says which one a drawn one is nearest to.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from llamagen_jax.commands import budget, emoji_judge, emoji_names
from llamagen_jax.commands.budget import Choices
from llamagen_jax.commands.generation import EXAMPLES
from llamagen_jax.commands.quickstart_text import extract_pairs, write_t5
from llamagen_jax.configs import (  # pyright: ignore[reportMissingImports]
  t2i_emoji,
  vq_emoji,
)
from llamagen_jax.data.emoji import SPLITS, Emoji, attribution, read_emoji, write_emoji
from llamagen_jax.evaluation.reconstruction import Reconstruction, reconstruct
from llamagen_jax.images import grid, save_png
from llamagen_jax.sampling.sample import sample
from llamagen_jax.storage import read_json, write_json, write_text
from llamagen_jax.text.t5 import T5Config
from llamagen_jax.text.tokens import CaptionTokens
from llamagen_jax.training import train_gpt, train_tokenizer
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.loop import Task
from llamagen_jax.training.tokenizer_step import TokenizerRecipe
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5

# 1500 pieces of words: most names are made of whole ones.
T5 = T5Config(1500, dim=128, layers=2, heads=4, head_dim=32, ffn_dim=256)
FAST_T5 = dataclasses.replace(T5, vocab_size=200)
SHARES = {"tokenizer": 0.25, "gpt": 0.53}  # of the minutes; the rest is for the others
MOST_STEPS = 100_000
FAST_STEPS = 5  # as the configs have it
FAST_EMOJI = 40  # of every split, in a smoke run
T5_EPOCHS = 25
JUDGE_EPOCHS = 12
SAMPLES = 300  # names of training, drawn once each
COLOUR_SAMPLES = 8  # of every shape in a colour that it never had
BATCH = 100
DEMO_PROMPTS = ("red heart", "flag of Japan", "woman firefighter with dark skin")
COPY = 10.0  # grey levels, root mean square
COLUMNS, SHOWN = 10, {"seen": 50, "tones": 14, "colours": 6}


def run(
  workdir: pathlib.Path, minutes: float, fast: bool, step: Callable
) -> dict[str, float]:
  """Runs what is not done yet and returns the measurements of `metrics.json`.

  Args:
    step: the quickstart's own, names each part.
  """
  choices = Choices(workdir, {"images": "emoji", "minutes": minutes, "fast": fast})

  def steps(name: str) -> Callable[[Task], int]:
    if fast:
      return lambda task: FAST_STEPS
    seconds = SHARES[name] * minutes * 60
    return lambda task: budget.steps_in_time(name, task, seconds, MOST_STEPS)

  images, side = workdir / "emoji", vq_emoji.get_config().data.image_size
  with step("images", "draw emoji at the size that is learned"):
    write_emoji(images, side, FAST_EMOJI if fast else None)
    print(f"   {attribution()}")
  with step("tokenizer", "train the VQ tokenizer"):
    budget.train(
      workdir / "tokenizer", train_tokenizer, TokenizerRecipe,
      functools.partial(_tokenizer_config, workdir, fast), choices, steps("tokenizer"),
    )  # fmt: skip
  with step("text", "train the text encoder; names to codes and features"):
    _write_t5(workdir / "t5", images / "train", fast)
    tokens = t2i_emoji.get_config().model.caption_tokens
    for split in ("train", "val"):
      extract_pairs(workdir, images / split, side, tokens)
    if not (workdir / EXAMPLES).exists():
      write_text(workdir / EXAMPLES, "\n".join(DEMO_PROMPTS))
  with step("gpt", "train the transformer on codes and features"):
    budget.train(
      workdir / "gpt", train_gpt, GPTRecipe,
      functools.partial(_gpt_config, workdir, fast), choices, steps("gpt"),
    )  # fmt: skip
  path = workdir / "metrics.json"
  if not path.exists():
    with step("judge", "draw emoji of names, seen and unseen, and look for them"):
      judge = Judge(workdir, epochs=1 if fast else JUDGE_EPOCHS)
      drawn = judge.draw()
      judge.write_grid(drawn, workdir / "samples.png")
      metrics = judge.scores(drawn)
    write_json(path, metrics)
  return read_json(path)


def _tokenizer_config(
  workdir: pathlib.Path, fast: bool, steps: int
) -> ml_collections.ConfigDict:
  config = vq_emoji.get_config("fast" if fast else f"steps={steps}")
  config.data.source = f"folder:{workdir}/emoji/train"
  config.data.eval_source = f"folder:{workdir}/emoji/val"
  return config


def _write_t5(folder: pathlib.Path, train: pathlib.Path, fast: bool) -> None:
  paths = sorted(train.glob("*/*.txt"))
  names = [path.read_text() for path in paths]
  images = np.stack([_image(path.with_suffix(".png")) for path in paths])
  epochs = 1 if fast else T5_EPOCHS

  def weights(config: T5Config, tokens: CaptionTokens) -> Any:
    params = emoji_names.fit(config, tokens, names, images, epochs=epochs, seed=0)
    return emoji_names.encoder(params)

  write_t5(folder, FAST_T5 if fast else T5, names, weights)


def _gpt_config(
  workdir: pathlib.Path, fast: bool, steps: int
) -> ml_collections.ConfigDict:
  config = t2i_emoji.get_config("fast" if fast else f"steps={steps}")
  for split, prefix in (("train", ""), ("val", "eval_")):
    config.data[f"{prefix}codes"] = f"{workdir}/codes/{split}"
    config.data[f"{prefix}texts"] = f"{workdir}/features/{split}"
  return config


class Judge:
  """Draws emoji of names with a workdir's models, and looks for them among real ones.

  Attributes:
    gpt: what draws.
    emoji: all real emoji that were drawn, in Unicode's order.
    images: uint8 [R, S, S, 3] of them.
    asked: rows of the emoji whose names are drawn, by kind of name.
  """

  def __init__(self, workdir: pathlib.Path, epochs: int):
    self.gpt = bundle.load_gpt(workdir / "gpt" / "bundle")
    self._tokenizer = bundle.load_tokenizer(workdir / "tokenizer" / "bundle")
    self._encoder = load_t5(workdir / "t5", dtype="float32")
    self.emoji, self.images = _load(workdir / "emoji")
    train = self.rows("train")
    self._network = emoji_judge.fit(self.images[train], epochs=epochs, seed=0)
    self._features = emoji_judge.features(self._network, self.images)
    self.accuracy = emoji_judge.jittered_accuracy(self._network, self.images, seed=1)
    self.held_out, _ = self.reconstruct(self.rows("val"))
    _, self._reconstructed = self.reconstruct(train)
    rng = np.random.default_rng(0)
    self.asked = {
      "seen": rng.choice(train, min(SAMPLES, len(train)), replace=False),
      "tones": self.rows("tones"),
      "colours": np.repeat(self.rows("colours"), COLOUR_SAMPLES),
    }

  def rows(self, split: str) -> np.ndarray:
    """Returns the rows of the emoji of a split."""
    return np.array([i for i, e in enumerate(self.emoji) if e.split == split])

  def reconstruct(self, rows: np.ndarray) -> tuple[Reconstruction, np.ndarray]:
    """Returns the scores of reconstructed emoji, and themselves, uint8 [N, S, S, 3]."""
    kept, parts = [], np.array_split(self.images[rows], -(-len(rows) // BATCH))
    batches = ({"image": x, "weight": np.ones(len(x), np.float32)} for x in parts)
    found = reconstruct(
      self._tokenizer.config, self._tokenizer.params, batches, shown=0,
      keep=lambda _, made: kept.append(made),
    )  # fmt: skip
    return found, np.concatenate(kept)

  def draw(self, **sampling: float) -> dict[str, np.ndarray]:
    """Samples emoji of the names of `asked`, uint8 [N, S, S, 3] of every kind."""
    return {kind: self._draw(rows, **sampling) for kind, rows in self.asked.items()}

  def _draw(self, rows: np.ndarray, **sampling: float) -> np.ndarray:
    prompts = [self.emoji[row].phrase for row in rows]
    return sample(
      self.gpt, self._tokenizer, prompts=prompts, text_encoder=self._encoder,
      batch_size=BATCH, **sampling,
    )  # fmt: skip

  def scores(self, drawn: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns what the table shows."""
    scores = {
      "psnr": self.held_out.psnr,
      "usage": self.held_out.usage,
      "judge": self.accuracy,
      "real": len(self.emoji),
    }
    for kind, rows in self.asked.items():
      found = emoji_judge.features(self._network, drawn[kind])
      ranks = emoji_judge.ranks(found, self._features, rows)
      scores[f"{kind}/count"] = len(rows)
      scores[f"{kind}/top1"] = float(np.mean(ranks < 1))
      scores[f"{kind}/top5"] = float(np.mean(ranks < 5))
    scores["copies"] = share_of_copies(drawn["seen"], self._reconstructed)
    return scores

  def write_grid(self, drawn: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes some of what was drawn, with its names, as a PNG."""
    images, labels = [], []
    for kind, count in SHOWN.items():
      rows, first = np.unique(self.asked[kind], return_index=True)
      chosen = first[_spread([self.emoji[row].group for row in rows], count)]
      images += [*drawn[kind][chosen]]
      names = [self.emoji[row].phrase for row in self.asked[kind][chosen]]
      labels += names if kind == "seen" else [f"unseen: {name}" for name in names]
    save_png(path, grid(np.stack(images), columns=COLUMNS, labels=labels, zoom=4))


def _load(folder: pathlib.Path) -> tuple[list[Emoji], np.ndarray]:
  paths = {path.stem: path for s in SPLITS for path in (folder / s).glob("*/*.png")}
  emoji = [e for e in read_emoji() if e.code in paths]
  return emoji, np.stack([_image(paths[e.code]) for e in emoji])


def _image(path: pathlib.Path) -> np.ndarray:
  return np.asarray(Image.open(path).convert("RGB"))


def share_of_copies(drawn: np.ndarray, training: np.ndarray) -> float:
  """Returns the share of images that are nearly an image of training, as decoded.

  Both are uint8; nearly: a root mean square difference below COPY grey levels.
  """
  x, y = (a.reshape(len(a), -1).astype(np.float32) for a in (drawn, training))
  squares = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * x @ y.T
  nearest = np.sqrt(np.maximum(squares.min(axis=1), 0) / x.shape[1])
  return float(np.mean(nearest < COPY))


def _spread(groups: list[str], count: int) -> np.ndarray:
  """Returns `count` random indices, as many of each group as there are."""
  seen, turns = {}, []
  for index in np.random.default_rng(0).permutation(len(groups)):
    group = groups[index]
    seen[group] = seen.get(group, 0) + 1
    turns.append((seen[group], group, index))
  return np.array([index for *_, index in sorted(turns)[:count]])


def print_table(m: dict[str, float], workdir: pathlib.Path, seconds: float) -> None:
  rows = [
    ("reconstruction of held-out emoji, PSNR", f"{m['psnr']:.1f} dB"),
    ("codebook in use on them", f"{m['usage']:.0%}"),
    ("judge on real emoji, moved, blurred and noisy", f"{m['judge']:.1%}"),
    ("seen names: the right emoji is the nearest", f"{m['seen/top1']:.1%}"),
    ("seen names: it is among the nearest five", f"{m['seen/top5']:.1%}"),
    ("unseen skin tones: it is the nearest", f"{m['tones/top1']:.1%}"),
    ("unseen colours: it is the nearest", f"{m['colours/top1']:.1%}"),
    ("seen names: a copy of a training emoji", f"{m['copies']:.1%}"),
    ("this run", f"{seconds:.0f} s"),
  ]
  width = max(len(name) for name, _ in rows)
  print(f"\n{m['real']:.0f} real emoji")
  print("\n".join(f"{name:{width}}  {value:>8}" for name, value in rows))
  print(
    f"\nLook at {workdir}/samples.png\nMore: llamagen sample --workdir={workdir}/gpt"
    f" --tokenizer={workdir}/tokenizer/bundle --t5={workdir}/t5"
    ' --prompts="red heart" --out=x.png\n'
    f"A server: llamagen serve --workdir={workdir} --demo"
  )
