"""T5 encoders <-> a folder as Hugging Face lays it out, local or in a bucket.

`config.json`, the weights as `files.read_folder` finds them, and the tokenizer's
`spiece.model` or `tokenizer.json`. A decoder in the same files is not read.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import storage
from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import shard_tree, shardings
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.text.t5 import T5Config, init_t5
from llamagen_jax.text.tokens import CaptionTokens
from llamagen_jax.weights.files import read_folder, write_weights
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  copy,
  linear,
  read_table,
  write_table,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FIELDS = {  # config.json's name -> ours
  "vocab_size": "vocab_size",
  "d_model": "dim",
  "num_layers": "layers",
  "num_heads": "heads",
  "d_kv": "head_dim",
  "d_ff": "ffn_dim",
  "relative_attention_num_buckets": "buckets",
  "relative_attention_max_distance": "max_distance",
  "layer_norm_epsilon": "norm_eps",
}
OPTIONAL = ("relative_attention_max_distance",)  # missing in old files
DECODER = ("decoder.", "lm_head.")


def load_t5(
  folder: str | os.PathLike, *, dtype: str, mesh: jax.sharding.Mesh | None = None
) -> TextEncoder:
  """Reads an encoder and its tokenizer, onto the first device or sharded over a mesh.

  Raises:
    UserError: a file is missing, the model is no T5 v1.1, or tensors do not fit.
  """
  folder = storage.user_path(folder)
  config = read_t5_config(folder, dtype)
  tokens = CaptionTokens.load(folder)
  if tokens.size > config.vocab_size:
    raise UserError(
      f"{folder}: the tokenizer has {tokens.size} tokens, the model {config.vocab_size}"
    )
  params = t5_from_torch(config, read_folder(folder))
  identity = _identity(config, params, tokens)
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if mesh is not None:
    boxed = jax.eval_shape(lambda key: init_t5(config, key), jax.random.key(0))
    sharding = shardings(mesh, boxed)
  return TextEncoder(config, shard_tree(params, sharding), tokens, identity)


def read_t5_config(folder: str | os.PathLike, dtype: str) -> T5Config:
  """Returns the shape of the encoder in a folder, from its config.json."""
  path = storage.user_path(folder) / CONFIG
  if not path.exists():
    raise UserError(f"{folder}: no {CONFIG}, so it is not a folder of T5")
  fields = storage.read_json(path)
  if not isinstance(fields, dict):
    raise UserError(f"{path}: holds a {type(fields).__name__}, expected an object")
  activation = fields.get("feed_forward_proj", "relu")
  if activation not in ("gated-gelu", "gated-gelu_new"):
    raise UserError(
      f"{path}: feed_forward_proj is {activation!r}; expected gated-gelu (T5 v1.1,"
      " flan-T5)"
    )
  missing = [n for n in FIELDS if n not in fields and n not in OPTIONAL]
  if missing:
    raise UserError(f"{path}: no field {missing[0]}")
  known = {FIELDS[name]: fields[name] for name in FIELDS if name in fields}
  return T5Config(**known, dtype=dtype)


def save_t5(folder: str | os.PathLike, config: T5Config, params: Any) -> None:
  """Writes config.json and model.safetensors; the caller adds the tokenizer."""
  folder = storage.user_path(folder)
  write_weights(folder / WEIGHTS, t5_to_torch(config, params))
  fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
  fields |= {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
  storage.write_json(folder / CONFIG, fields)


def t5_from_torch(config: T5Config, state_dict: Mapping[str, Array]) -> dict[str, Any]:
  """Returns an encoder's parameters, numpy arrays of `config.dtype`."""
  state_dict = {n: v for n, v in state_dict.items() if not n.startswith(DECODER)}
  twin = state_dict.pop("encoder.embed_tokens.weight", None)
  table = state_dict.get("shared.weight", twin)
  if twin is not None and not np.array_equal(table, twin):
    raise UserError("shared.weight and encoder.embed_tokens.weight differ")
  if table is not None:
    state_dict["shared.weight"] = table
  dtype = jnp.dtype(config.dtype)
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype, copy=False), read_table(_table(config), state_dict)
  )


def t5_to_torch(config: T5Config, params: Any) -> dict[str, Array]:
  """Returns the tensors of an encoder by name, the inverse of `t5_from_torch`."""
  return write_table(_table(config), params)


def _table(config: T5Config) -> list[Entry]:
  c = config
  D, N, H, F = c.dim, c.heads, c.head_dim, c.ffn_dim
  first = "encoder.block.0.layer.0.SelfAttention"
  table = [
    copy(("embedding",), "shared.weight", (c.vocab_size, D)),
    copy(("position_bias",), f"{first}.relative_attention_bias.weight", (c.buckets, N)),
    copy(("norm",), "encoder.final_layer_norm.weight", (D,)),
  ]
  for i in range(c.layers):
    attention, ffn = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
    qkv = {f"{attention}.SelfAttention.{x}.weight": (N * H, D) for x in "qkv"}
    dense = f"{ffn}.DenseReluDense"
    layer = [
      copy(("layers", "attention_norm"), f"{attention}.layer_norm.weight", (D,)),
      copy(("layers", "ffn_norm"), f"{ffn}.layer_norm.weight", (D,)),
      Entry(
        ("layers", "qkv"),
        qkv,
        lambda *ws: np.stack([w.T.reshape(D, N, H) for w in ws], axis=1),
        lambda p: tuple(p[:, j].reshape(D, N * H).T for j in range(3)),
      ),
      Entry(
        ("layers", "out"),
        {f"{attention}.SelfAttention.o.weight": (D, N * H)},
        lambda w: w.T.reshape(N, H, D),
        lambda p: (p.reshape(N * H, D).T,),
      ),
      Entry(
        ("layers", "in"),
        {f"{dense}.wi_0.weight": (F, D), f"{dense}.wi_1.weight": (F, D)},
        lambda gate, up: np.stack([gate.T, up.T], axis=1),
        lambda p: (p[:, 0].T, p[:, 1].T),
      ),
      linear(("layers", "ffn_out"), f"{dense}.wo.weight", (D, F), True),
    ]
    table += [dataclasses.replace(e, layer=i, layers=c.layers) for e in layer]
  return table


def _identity(config: T5Config, params: Any, tokens: CaptionTokens) -> str:
  """Returns the sha256 of the shape, the weights in bfloat16, and the vocabulary.

  The float32 and the bfloat16 form of a model have the same identity.
  """
  shape = dataclasses.asdict(config)
  del shape["dtype"]
  digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
  for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    digest.update(path.encode())
    rounded = np.ascontiguousarray(value.astype(jnp.bfloat16))
    digest.update(rounded.view(np.uint16))
  digest.update(tokens.identity.encode())
  return digest.hexdigest()
