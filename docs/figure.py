"""Draws how_it_works.png from a finished quickstart.

`python docs/figure.py WORKDIR`
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
import numpy as np
from PIL import Image

import llamagen_jax as lg

LABEL = 7
HERE = pathlib.Path(__file__).parent


def main(workdir: pathlib.Path) -> None:
  tokenizer = lg.load_tokenizer(workdir / "tokenizer" / "bundle")
  gpt = lg.load_gpt(workdir / "gpt" / "bundle")
  path = min((workdir / "digits" / "test" / str(LABEL)).iterdir())
  image = np.asarray(Image.open(path).convert("RGB"))
  codes = np.asarray(tokenizer.encode(image[None]))[0]
  sampled = lg.sample(gpt, tokenizer, classes=[LABEL], guidance_scale=3.0, seed=4)[0]
  new = np.asarray(tokenizer.encode(sampled[None]))[0]

  figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), dpi=110)
  panels = (
    ("image", image), ("codes", codes), ("codes, sampled one by one", new),
    ("sampled image", sampled),
  )  # fmt: skip
  for axis, (title, values) in zip(axes, panels, strict=True):
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])
    if values.ndim == 3:
      axis.imshow(values)
      continue
    axis.imshow(values, cmap="viridis", alpha=0.55)
    for (y, x), code in np.ndenumerate(values):
      axis.text(x, y, str(code), ha="center", va="center", fontsize=6.5)
  arrows = ("encoder", f"transformer,\ngiven the class {LABEL}", "decoder")
  for left, right, text in zip(axes[:-1], axes[1:], arrows, strict=True):
    start, stop = left.get_position().x1, right.get_position().x0
    y = left.get_position().y0 + left.get_position().height / 2
    figure.text((start + stop) / 2, y, "→", ha="center", va="center", fontsize=20)
    figure.text((start + stop) / 2, 0.03, text, ha="center", fontsize=10)
  figure.savefig(HERE / "how_it_works.png", bbox_inches="tight")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
