"""CLIP (arXiv 2103.00020) in Flax: how well images fit their prompts.

Axes: B batch, T tokens or patches, D width, N heads, H head dim, F ffn, E embedding.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.errors import UserError

NORM_EPS = 1e-5
HIGHEST = jax.lax.Precision.HIGHEST
ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's weights
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
  """Shape of one of the two transformers."""

  layers: int
  width: int
  heads: int
  ffn_dim: int


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Shape of a CLIP, and mean and deviation of its images."""

  text: TowerConfig
  vision: TowerConfig
  embedding_dim: int
  vocab_size: int
  context: int  # tokens of a prompt, with the two around it
  image_size: int
  patch: int  # side, in pixels
  activation: str
  mean: tuple[float, float, float]  # of images in [0, 1]
  deviation: tuple[float, float, float]

  def __post_init__(self):
    for name in ("text", "vision"):
      if isinstance(getattr(self, name), dict):
        object.__setattr__(self, name, TowerConfig(**getattr(self, name)))
    for name in ("mean", "deviation"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.activation not in ACTIVATIONS:
      raise UserError(
        f"CLIP's activation is {self.activation!r}, expected one of"
        f" {', '.join(ACTIVATIONS)}"
      )


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)), both with biases."""

  config: TowerConfig
  activation: str
  causal: bool

  @nn.compact
  def __call__(self, x_BTD, _):
    c = self.config
    y_BTD = norm(self, "attention_norm", x_BTD)
    qkv_BTX = dense(self, "qkv", y_BTD, 3 * c.width)
    q_BTNH, k_BTNH, v_BTNH = (
      part.reshape(*part.shape[:2], c.heads, -1)
      for part in jnp.split(qkv_BTX, 3, axis=-1)
    )
    scale = q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.einsum(
      "BTNH,BSNH->BNTS", q_BTNH * scale, k_BTNH, precision=HIGHEST
    )
    if self.causal:
      tokens = x_BTD.shape[1]
      seen_TS = np.tril(np.ones((tokens, tokens), bool))
      scores_BNTS = jnp.where(seen_TS, scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    mixed_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH, precision=HIGHEST)
    x_BTD = x_BTD + dense(self, "out", mixed_BTNH.reshape(x_BTD.shape), c.width)
    hidden_BTF = dense(self, "ffn_in", norm(self, "ffn_norm", x_BTD), c.ffn_dim)
    hidden_BTF = ACTIVATIONS[self.activation](hidden_BTF)
    return x_BTD + dense(self, "ffn_out", hidden_BTF, c.width), None


def transformer(config: TowerConfig, activation: str, causal: bool) -> nn.Module:
  """Returns blocks with parameters stacked over layers, as a submodule `layers`."""
  scanned = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=config.layers,
  )
  return scanned(config, activation, causal, name="layers")


class TextTower(nn.Module):
  """Embeds int32 ids [B, T] with the index of each text's end [B] as [B, E]."""

  config: ClipConfig

  @nn.compact
  def __call__(self, ids_BT, end_B):
    c, normal = self.config, nn.initializers.normal(0.02)
    width = c.text.width
    table_VD = self.param("embedding", normal, (c.vocab_size, width))
    positions_TD = self.param("positions", normal, (c.context, width))
    x_BTD = table_VD[ids_BT] + positions_TD
    x_BTD, _ = transformer(c.text, c.activation, causal=True)(x_BTD, None)
    # The mask is causal -> tokens behind the end change nothing.
    x_BD = norm(self, "norm", x_BTD[jnp.arange(len(end_B)), end_B])
    projection_DE = self.param("projection", normal, (width, c.embedding_dim))
    return jnp.matmul(x_BD, projection_DE, precision=HIGHEST)


class VisionTower(nn.Module):
  """Embeds uint8 images [B, S, S, 3] of the model's size as [B, E]."""

  config: ClipConfig

  @nn.compact
  def __call__(self, images):
    c, normal = self.config, nn.initializers.normal(0.02)
    width, side = c.vision.width, c.image_size // c.patch
    x = (images.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.deviation)
    kernel = self.param("patch", normal, (c.patch, c.patch, 3, width))
    x_BTD = jax.lax.conv_general_dilated(
      x, kernel, (c.patch, c.patch), "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=HIGHEST,
    ).reshape(len(x), side * side, width)  # fmt: skip
    token_D = self.param("class_token", normal, (width,))
    token_B1D = jnp.broadcast_to(token_D, (len(x), 1, width))
    x_BTD = jnp.concatenate([token_B1D, x_BTD], axis=1)
    x_BTD = x_BTD + self.param("positions", normal, (side * side + 1, width))
    x_BTD = norm(self, "first_norm", x_BTD)
    x_BTD, _ = transformer(c.vision, c.activation, causal=False)(x_BTD, None)
    projection_DE = self.param("projection", normal, (width, c.embedding_dim))
    x_BD = norm(self, "norm", x_BTD[:, 0])
    return jnp.matmul(x_BD, projection_DE, precision=HIGHEST)


class Clip(nn.Module):
  """Both towers; embeddings have length 1."""

  config: ClipConfig

  def setup(self):
    self.text, self.vision = TextTower(self.config), VisionTower(self.config)

  def __call__(self, ids_BT, end_B, images):
    return self.embed_text(ids_BT, end_B), self.embed_images(images)

  def embed_text(self, ids_BT, end_B):
    return unit(self.text(ids_BT, end_B))

  def embed_images(self, images):
    return unit(self.vision(images))


def norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """Returns x normalised over the last axis, with a scale and a bias of `module`."""
  shape = x.shape[-1:]
  scale = module.param(f"{name}_scale", nn.initializers.ones, shape)
  bias = module.param(f"{name}_bias", nn.initializers.zeros, shape)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + NORM_EPS) * scale + bias


def dense(module: nn.Module, name: str, x: jax.Array, width: int) -> jax.Array:
  shape = (x.shape[-1], width)
  kernel = module.param(f"{name}_kernel", nn.initializers.lecun_normal(), shape)
  bias = module.param(f"{name}_bias", nn.initializers.zeros, (width,))
  return jnp.matmul(x, kernel, precision=HIGHEST) + bias


def unit(x_BE: jax.Array) -> jax.Array:
  return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def similarity(
  config: ClipConfig, params: Any, ids_BT: jax.Array, end_B: jax.Array, images
) -> jax.Array:
  """Returns the cosine similarity of every image and its text, [B]."""
  text, vision = Clip(config).apply({"params": params}, ids_BT, end_B, images)
  return jnp.sum(text * vision, axis=-1)


def abstract_clip(config: ClipConfig) -> Any:
  """Returns the shapes of the parameters."""
  side = config.image_size
  ids, end, images = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((1, config.context), jnp.int32),
      ((1,), jnp.int32),
      ((1, side, side, 3), jnp.uint8),
    )
  )  # fmt: skip
  init = functools.partial(Clip(config).init, jax.random.key(0))
  return jax.eval_shape(init, ids, end, images)["params"]
