"""A small T5 that learns what names look like, for `quickstart --emoji`.

It is trained on the names and images of the training emoji: from the features of a
name's tokens, every cell of a coarse image is predicted by attention with a query of
its own, much as the transformer's codes look at a caption later. Only the encoder is
kept. A transformer that reads features of random weights learns emoji by heart from
their first codes, and hardly listens to the names.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.text.t5 import T5Config, T5Encoder
from llamagen_jax.text.tokens import CaptionTokens

SIDE = 16  # pixels of the coarse image
GRID = 8  # cells along a side
CELL = (SIDE // GRID) ** 2 * 3  # values of a cell
WIDTH = 256  # of the perceptron behind the attention
ARTICLES = ("", "a ", "the ")  # one writes "a red heart" as well
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
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
    return nn.Dense(CELL)(nn.gelu(nn.Dense(WIDTH)(x_BCD)))


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
  longest = max(len(tokens.ids(f"the {name}", 1000)) for name in names)
  rows = [tokens.rows([a + name for name in names], longest) for a in ARTICLES]
  ids_ANT, mask_ANT = (np.stack(x) for x in zip(*rows, strict=True))
  cells_NCV = coarse_cells(images)
  reader, batch = NameReader(config), min(BATCH, len(names))
  steps = max(1, epochs * (len(names) // batch))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, LEARNING_RATE, min(WARMUP_STEPS, steps // 10), steps
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
  )

  def loss_fn(params, ids_BT, mask_BT, cells_BCV):
    found_BCV = reader.apply({"params": params}, ids_BT, mask_BT)
    return jnp.mean((found_BCV - cells_BCV) ** 2)

  @jax.jit
  def step(params, state, *batch):
    loss, gradients = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  key, rng = jax.random.key(seed), np.random.default_rng(seed)
  params = unbox(reader.init(key, ids_ANT[0, :1], mask_ANT[0, :1])["params"])
  state = optimizer.init(params)
  for _ in (progress := tqdm.trange(epochs, desc="t5", unit="epoch")):
    order, losses = rng.permutation(len(names)), []
    for start in range(0, len(names) - batch + 1, batch):
      n = order[start : start + batch]
      a = rng.integers(len(ARTICLES), size=batch)
      data = ids_ANT[a, n], mask_ANT[a, n], cells_NCV[n]
      params, state, loss = step(params, state, *data)
      losses.append(loss)
    progress.set_postfix(loss=f"{np.mean(losses):.3f}")
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
