"""Transformers of the original <-> ours."""

from collections.abc import Mapping
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.conditioning import GUIDANCE_WIDTH
from llamagen_jax.gpt.config import PRESETS, GPTConfig
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  copy,
  defer_table,
  linear,
  shape_of,
  write_table,
)

GUIDANCE = "t_embedder.mlp"  # of guidance-free models
EMBEDDING = "tok_embeddings.weight"  # a tensor that every transformer has


def gpt_from_torch(
  state_dict: Mapping[str, Array],
  *,
  num_heads: int | None = None,
  image_tokens: int | None = None,
  **changes,
) -> tuple[GPTConfig, dict[str, Any]]:
  """Reads a transformer of the original or of its successors.

  Args:
    state_dict: names -> arrays or torch tensors, PyTorch layouts ([out, in]).
    num_heads: needed where (layers, dim) is not a published preset's.
    image_tokens: codes an image; 256 if not given.
    **changes: fields of `GPTConfig` that shapes cannot tell.

  Returns:
    The config and float32 parameters, stacked over layers.

  Raises:
    UserError: with every missing, unexpected or misshapen tensor; with the one that
      tells a size, if that is missing; with values that are not finite.
  """
  config, params = defer_gpt(
    state_dict, num_heads=num_heads, image_tokens=image_tokens, **changes
  )
  return config, jax.tree.map(lambda load: load(), params)


def defer_gpt(
  state_dict: Mapping[str, Array],
  *,
  num_heads: int | None = None,
  image_tokens: int | None = None,
  **changes,
) -> tuple[GPTConfig, dict[str, Any]]:
  """Returns what `gpt_from_torch` does, with functions that read and return arrays."""
  config = _gpt_config(state_dict, num_heads, image_tokens or 256, changes)
  return config, defer_table(_gpt_table(config), state_dict)


def gpt_to_torch(config: GPTConfig, params: dict[str, Any]) -> dict[str, Array]:
  """Returns the original's tensors by name, the inverse of `gpt_from_torch`."""
  return write_table(_gpt_table(config), params)


def _gpt_config(state_dict, num_heads, image_tokens, changes) -> GPTConfig:
  layers = len({m[1] for n in state_dict if (m := re.match(r"layers\.(\d+)\.", n))})
  vocab_size, dim = shape_of(state_dict, EMBEDDING, 2)
  by_shape = {(n, d): heads for n, heads, d in PRESETS.values()}
  heads = num_heads or changes.get("heads") or by_shape.get((layers, dim))
  if heads is None:
    raise UserError(
      f"{layers} layers of width {dim} are no published model: give num_heads"
    )
  qkv = shape_of(state_dict, "layers.0.attention.wqkv.weight", 2)
  kv_heads = (qkv[0] * heads // dim - heads) // 2
  grid = round(image_tokens**0.5)
  if grid**2 != image_tokens:
    raise UserError(f"image_tokens={image_tokens} is not a square: give grid instead")
  fields = {
    "guidance_embedding": f"{GUIDANCE}.0.weight" in state_dict,
    "layers": layers,
    "heads": heads,
    "dim": dim,
    "grid": grid,
    "kv_heads": 0 if kv_heads == heads else kv_heads,
    "vocab_size": vocab_size,
  }
  config = GPTConfig(**(fields | _condition(state_dict) | changes))
  ffn_dim = shape_of(state_dict, "layers.0.feed_forward.w1.weight", 2)[0]
  if ffn_dim != config.ffn_dim and ffn_dim >= 8 * dim // 3:
    config = dataclasses.replace(config, ffn_multiple=ffn_dim)
  return config


def _condition(state_dict) -> dict[str, Any]:
  """Fields of the config that the condition's tensors tell."""
  if "cls_embedding.embedding_table.weight" in state_dict:
    classes = shape_of(state_dict, "cls_embedding.embedding_table.weight", 2)[0] - 1
    return {"condition": "class", "num_classes": classes}
  tokens, width = shape_of(state_dict, "cls_embedding.uncond_embedding", 2)
  return {"condition": "caption", "caption_tokens": tokens, "caption_dim": width}


def _gpt_table(config: GPTConfig) -> list[Entry]:
  c = config
  if c.qk_norm:
    raise UserError("model.qk_norm: the PyTorch model has no norm of queries and keys")
  if c.target_embedding:
    raise UserError(
      "model.target_embedding: the PyTorch model has no embedding of the position to"
      " predict, so a model trained in random orders cannot be exported"
    )
  D = c.dim
  table = [
    linear(("code_embedding",), "tok_embeddings.weight", (c.vocab_size, D), False),
    linear(("head",), "output.weight", (c.vocab_size, D), True),
    copy(("norm",), "norm.weight", (D,)),
  ]
  if c.condition == "class":
    name, shape = "cls_embedding.embedding_table.weight", (c.num_classes + 1, D)
    table.append(linear(("condition", "table"), name, shape, False))
  else:
    mlp, P, C = "cls_embedding.cap_proj", c.caption_tokens, c.caption_dim
    name = "cls_embedding.uncond_embedding"
    table += [
      copy(("condition", "unconditional"), name, (P, C)),
      linear(("condition", "in"), f"{mlp}.fc1.weight", (D, C), True),
      linear(("condition", "out"), f"{mlp}.fc2.weight", (D, D), True),
    ]
  if c.guidance_embedding:
    for ours, theirs, width in (("in", 0, GUIDANCE_WIDTH), ("out", 2, D)):
      name = f"{GUIDANCE}.{theirs}"
      table += [
        linear(("guidance", ours), f"{name}.weight", (D, width), True),
        copy(("guidance", f"{ours}_bias"), f"{name}.bias", (D,)),
      ]
  for i in range(c.layers):
    layer = _layer_table(c, f"layers.{i}")
    table += [dataclasses.replace(e, layer=i, layers=c.layers) for e in layer]
  return table


def _layer_table(c: GPTConfig, torch: str) -> list[Entry]:
  """Returns the entries of one layer, whose tensors' names begin with `torch`."""
  D, K, G, H, F = (
      c.dim, c.num_kv_heads, c.heads // c.num_kv_heads, c.head_dim, c.ffn_dim,
  )  # fmt: skip
  ours, attention, ffn = ("layers",), f"{torch}.attention", f"{torch}.feed_forward"
  return [
    copy((*ours, "attention_norm"), f"{torch}.attention_norm.weight", (D,)),
    copy((*ours, "ffn_norm"), f"{torch}.ffn_norm.weight", (D,)),
    Entry(
      (*ours, "attention", "qkv"),
      {f"{attention}.wqkv.weight": (K * (G + 2) * H, D)},
      functools.partial(_pack_qkv, K, G, H),
      functools.partial(_unpack_qkv, K, G, H),
    ),
    Entry(
      (*ours, "attention", "out"),
      {f"{attention}.wo.weight": (D, K * G * H)},
      lambda w: w.T.reshape(K, G, H, D),
      lambda p: (p.reshape(K * G * H, D).T,),
    ),
    Entry(
      (*ours, "ffn", "in"),
      {f"{ffn}.w1.weight": (F, D), f"{ffn}.w3.weight": (F, D)},
      lambda w1, w3: np.stack([w1.T, w3.T], axis=1),
      lambda p: (p[:, 0].T, p[:, 1].T),
    ),
    linear((*ours, "ffn", "out"), f"{ffn}.w2.weight", (D, F), True),
  ]


def _pack_qkv(K, G, H, w):
  """Returns [D, K, G + 2, H] of queries, keys and values [(N + 2K) H, D]."""
  q, k, v = np.split(w, [K * G * H, K * (G + 1) * H])
  q, k = (_halves_from_pairs(x.reshape(K, -1, H, w.shape[1])) for x in (q, k))
  packed = np.concatenate([q, k, v.reshape(K, 1, H, -1)], axis=1)
  return packed.transpose(3, 0, 1, 2)


def _unpack_qkv(K, G, H, p):
  packed = p.transpose(1, 2, 3, 0)  # [K, G + 2, H, D]
  q, k, v = packed[:, :G], packed[:, G : G + 1], packed[:, G + 1 :]
  parts = (_pairs_from_halves(q), _pairs_from_halves(k), v)
  return (np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts]),)


def _halves_from_pairs(x_KGHD):
  """Reorders channels (0, 1, 2, ..) of heads to (0, 2, .., 1, 3, ..): gpt/rope.py."""
  return np.concatenate([x_KGHD[:, :, 0::2], x_KGHD[:, :, 1::2]], axis=2)


def _pairs_from_halves(x_KGHD):
  halves = np.split(x_KGHD, 2, axis=2)
  return np.stack(halves, axis=3).reshape(x_KGHD.shape)
