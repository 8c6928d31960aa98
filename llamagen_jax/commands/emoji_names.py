"""A small T5 that learns what names look like, for `quickstart --emoji`.

It is trained on the names and images of the training emoji: from the features of a
name's tokens, every cell of a coarse image is predicted by attention with a query of
its own, much as the transformer's codes look at a caption later. Only the encoder is
kept. A transformer that reads features of random weights learns emoji by heart from
their first codes, and hardly listens to the names.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers as MatrixAxes

from llamagen_jax.commands import fitting
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.text.t5 import T5Config, T5Encoder
from llamagen_jax.text.tokens import CaptionTokens
from llamagen_jax.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)

SIDE = 16  # pixels of the coarse image
GRID = 8  # cells along a side
CELL = (SIDE // GRID) ** 2 * 3  # values of a cell
WIDTH = 256  # of the perceptron behind the attention
ARTICLES = ("", "a ")  # one writes "a red heart" as well
BATCH = 64
# The coarse image of 91 % of the training names is found after 75 s; of 85 % with
# 1.2e-2, of 79 % with AdamW at 2e-3 after 61 s.
OPTIMIZER = OptimizerConfig(lr=4e-3, kind="muon", schedule="cosine", weight_decay=0.01)
WARMUP_STEPS = 50
MATRICES = {  # by the last names of a parameter, the axes for Muon
  ("layers", "qkv"): MatrixAxes((1,), (3, 4)),
  ("layers", "out"): MatrixAxes((1, 2), (3,)),
  ("layers", "in"): MatrixAxes((1,), (3,)),
  ("layers", "ffn_out"): MatrixAxes((1,), (2,)),
  ("key", "kernel"): MatrixAxes((0,), (1, 2)),
  ("value", "kernel"): MatrixAxes((0,), (1, 2)),
  ("hidden", "kernel"): MatrixAxes((0,), (1,)),
}
# Of the features that are kept. The transformer's embedder starts with small weights:
# 800 steps make a name worth 148 nats of an image with it, 125 without.
FEATURE_SCALE = 8


class NameReader(nn.Module):
  """Token ids and mask [B, T] -> the cells of a coarse image, [B, GRID**2, CELL]."""

  config: T5Config

  @nn.compact
  def __call__(self, ids_BT, mask_BT):
    c = self.config
    cells, heads = GRID**2, (c.heads, c.head_dim)
    x_BTD = T5Encoder(c, name="t5")(ids_BT, mask_BT)
    normal = nn.initializers.normal(1.0)
    query_CNH = self.param("query", normal, (cells, *heads))
    place_CD = self.param("place", normal, (cells, c.heads * c.head_dim))
    key_BTNH = nn.DenseGeneral(heads, use_bias=False, name="key")(x_BTD)
    value_BTNH = nn.DenseGeneral(heads, use_bias=False, name="value")(x_BTD)
    seen_BCNH = jax.nn.dot_product_attention(
      jnp.broadcast_to(query_CNH, (len(ids_BT), *query_CNH.shape)),
      key_BTNH, value_BTNH, mask=mask_BT[:, None, None] > 0,
    )  # fmt: skip
    x_BCD = seen_BCNH.reshape(len(ids_BT), cells, -1) + place_CD
    return nn.Dense(CELL, name="cells")(nn.gelu(nn.Dense(WIDTH, name="hidden")(x_BCD)))


def fit(
  config: T5Config,
  tokens: CaptionTokens,
  names: Sequence[str],
  images: np.ndarray,
  *,
  epochs: int,
  seed: int,
) -> Any:
  """Fits a reader on uint8 images [N, S, S, 3] of names; returns its parameters."""
  longest = max(len(tokens.ids(ARTICLES[-1] + name, 1000)) for name in names)
  rows = [tokens.rows([a + name for name in names], longest) for a in ARTICLES]
  ids_ANT, mask_ANT = (np.stack(x) for x in zip(*rows, strict=True))
  cells_NCV = coarse_cells(images)
  reader, batch = NameReader(config), min(BATCH, len(names))
  steps = max(1, epochs * (len(names) // batch))
  warmed = dataclasses.replace(OPTIMIZER, warmup_steps=min(WARMUP_STEPS, steps // 10))
  optimizer = make_optimizer(
    warmed, learning_rate(warmed, steps), lambda path: MATRICES.get(tuple(path[-2:]))
  )

  def loss_fn(params, ids_BT, mask_BT, cells_BCV):
    found_BCV = reader.apply({"params": params}, ids_BT, mask_BT)
    return jnp.mean((found_BCV - cells_BCV) ** 2)

  def batches():
    rng = np.random.default_rng(seed)
    for n in fitting.shuffled_rows(len(names), batch, epochs, rng):
      a = rng.integers(len(ARTICLES), size=batch)
      yield ids_ANT[a, n], mask_ANT[a, n], cells_NCV[n]

  start = reader.init(jax.random.key(seed), ids_ANT[0, :1], mask_ANT[0, :1])
  params = unbox(start["params"])
  params = fitting.fit(loss_fn, params, optimizer, batches(), steps=steps, name="t5")
  return jax.device_get(params)


def encoder(params: Any) -> Any:
  """Returns the parameters of a fitted reader's T5."""
  t5 = params["t5"]
  return t5 | {"norm": t5["norm"] * FEATURE_SCALE}


def coarse_cells(images: np.ndarray) -> np.ndarray:
  """Returns uint8 images [N, S, S, 3] as cells [N, GRID**2, CELL] of coarse ones.

  What all images have in common is taken off, and the rest has a deviation of 1.
  """
  shape = (len(images), SIDE, SIDE, 3)
  values = images.astype(np.float32) / 255
  x = np.array(jax.image.resize(values, shape, "linear", antialias=True))
  x -= x.mean(axis=0)
  x /= x.std()
  side = SIDE // GRID
  x = x.reshape(-1, GRID, side, GRID, side, 3).swapaxes(2, 3)
  return x.reshape(len(images), GRID**2, CELL)
