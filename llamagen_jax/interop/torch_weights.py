"""Published PyTorch state dicts <-> our parameter trees.

One table a model: every parameter of ours names the tensors it is made of. Both
directions read the same table, and both are strict.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

import flax
import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import PRESETS, GPTConfig
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training.mesh import unbox

# Buffers of the original that are recomputed or not used here.
IGNORED = ("codebook_used", "freqs_cis", "causal_mask", "num_batches_tracked")
MOST_PROBLEMS_SHOWN = 20

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of ours and the torch tensors it holds."""

  path: tuple[str, ...]  # in our tree
  tensors: dict[str, tuple[int, ...]]  # torch name -> shape
  pack: Callable[..., Array]  # torch tensors -> our array
  unpack: Callable[[Array], tuple[Array, ...]]  # our array -> torch tensors
  layer: int | None = None  # row of a stacked array
  layers: int = 0  # rows of it


def gpt_from_torch(
  state_dict: Mapping[str, Array],
  *,
  num_heads: int | None = None,
  image_tokens: int | None = None,
  **changes,
) -> tuple[GPTConfig, dict[str, Any]]:
  """Reads a transformer of the original.

  Args:
    state_dict: names -> arrays, PyTorch layouts ([out, in]).
    num_heads: needed where (layers, dim) is not a published preset's.
    image_tokens: codes a picture; 256 if not given.
    **changes: fields of `GPTConfig` that shapes cannot tell.

  Returns:
    The config and float32 parameters, stacked over layers.

  Raises:
    UserError: with every missing, unexpected or misshapen tensor.
  """
  config = _gpt_config(state_dict, num_heads, image_tokens or 256, changes)
  return config, _read(_gpt_table(config), state_dict)


def gpt_to_torch(config: GPTConfig, params: dict[str, Any]) -> dict[str, Array]:
  """The inverse of `gpt_from_torch`: names, shapes and values of the original."""
  return _write(_gpt_table(config), params)


def tokenizer_from_torch(
  state_dict: Mapping[str, Array], **changes
) -> tuple[TokenizerConfig, dict[str, Any]]:
  """Reads a VQ tokenizer of the original; see `gpt_from_torch`."""
  config = _tokenizer_config(state_dict, changes)
  return config, _read(_tokenizer_table(config), state_dict)


def tokenizer_to_torch(
  config: TokenizerConfig, params: dict[str, Any]
) -> dict[str, Array]:
  """The inverse of `tokenizer_from_torch`."""
  return _write(_tokenizer_table(config), params)


def _read(table: list[Entry], state_dict: Mapping[str, Array]) -> dict[str, Any]:
  expected = {name: shape for e in table for name, shape in e.tensors.items()}
  problems = [f"missing {n} {s}" for n, s in expected.items() if n not in state_dict]
  for name, value in state_dict.items():
    if name in expected and tuple(value.shape) != expected[name]:
      problems.append(f"{name} is {tuple(value.shape)}, expected {expected[name]}")
    elif name not in expected and name.rpartition(".")[2] not in IGNORED:
      problems.append(f"unexpected {name} {tuple(value.shape)}")
  if problems:
    more = len(problems) - MOST_PROBLEMS_SHOWN
    shown = problems[:MOST_PROBLEMS_SHOWN] + [f"and {more} more"] * (more > 0)
    raise UserError(
      f"state dict does not fit the model, {len(problems)} problems: "
      + "; ".join(shown)
    )

  flat = {}
  for entry in table:
    value = entry.pack(*(np.asarray(state_dict[n], np.float32) for n in entry.tensors))
    if entry.layer is None:
      flat[entry.path] = np.ascontiguousarray(value)
    else:  # filled row by row, so that a big model is held once
      if entry.path not in flat:
        flat[entry.path] = np.empty((entry.layers, *value.shape), np.float32)
      flat[entry.path][entry.layer] = value
  return flax.traverse_util.unflatten_dict(flat)


def _write(table: list[Entry], params: dict[str, Any]) -> dict[str, Array]:
  flat = flax.traverse_util.flatten_dict(params)
  state_dict = {}
  for entry in table:
    value = np.asarray(flat[entry.path])
    tensors = entry.unpack(value if entry.layer is None else value[entry.layer])
    for name, tensor in zip(entry.tensors, tensors, strict=True):
      state_dict[name] = np.ascontiguousarray(tensor)
  return state_dict


def _gpt_config(state_dict, num_heads, image_tokens, changes) -> GPTConfig:
  layers = len({m[1] for n in state_dict if (m := re.match(r"layers\.(\d+)\.", n))})
  embedding = _shape(state_dict, "tok_embeddings.weight", 2)
  qkv = _shape(state_dict, "layers.0.attention.wqkv.weight", 2)
  vocab_size, dim = embedding
  by_shape = {(n, d): heads for n, heads, d in PRESETS.values()}
  heads = num_heads or by_shape.get((layers, dim))
  if heads is None:
    raise UserError(
      f"{layers} layers of width {dim} are no published model: give num_heads"
    )
  kv_heads = (qkv[0] * heads // dim - heads) // 2
  grid = round(image_tokens**0.5)
  if grid**2 != image_tokens:
    raise UserError(f"image_tokens={image_tokens} is not a square")
  if "cls_embedding.embedding_table.weight" in state_dict:
    classes = _shape(state_dict, "cls_embedding.embedding_table.weight", 2)[0] - 1
    condition = {"condition": "class", "num_classes": classes}
  else:
    tokens, width = _shape(state_dict, "cls_embedding.uncond_embedding", 2)
    condition = {
      "condition": "caption",
      "caption_tokens": tokens,
      "caption_dim": width,
    }
  fields = {
    "kv_heads": 0 if kv_heads == heads else kv_heads,
    "vocab_size": vocab_size,
  }
  return GPTConfig(layers, heads, dim, grid, **(fields | condition | changes))


def _tokenizer_config(state_dict, changes) -> TokenizerConfig:
  codebook_size, codebook_dim = _shape(state_dict, "quantize.embedding.weight", 2)
  width = _shape(state_dict, "encoder.conv_in.weight", 4)[0]
  levels = {
    int(m[1]) for n in state_dict if (m := re.match(r"encoder\.conv_blocks\.(\d+)", n))
  }
  blocks = {
    m[1]
    for n in state_dict
    if (m := re.match(r"encoder\.conv_blocks\.0\.res\.(\d+)", n))
  }
  channels = [
    _shape(state_dict, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0]
    for i in sorted(levels)
  ]
  fields = {
    "channel_multipliers": tuple(c // width for c in channels),
    "width": width,
    "res_blocks": len(blocks),
    "latent_width": _shape(state_dict, "quant_conv.weight", 4)[1],
    "codebook_size": codebook_size,
    "codebook_dim": codebook_dim,
  }
  return TokenizerConfig(**(fields | changes))


def _shape(state_dict, name: str, rank: int) -> tuple[int, ...]:
  if name not in state_dict:
    raise UserError(f"state dict has no {name}: it is not a checkpoint of this model")
  shape = tuple(state_dict[name].shape)
  if len(shape) != rank:
    raise UserError(f"{name} is {shape}, expected {rank} axes")
  return shape


def _gpt_table(config: GPTConfig) -> list[Entry]:
  c = config
  D, K, G, H, F = (
      c.dim, c.num_kv_heads, c.heads // c.num_kv_heads, c.head_dim, c.ffn_dim,
  )  # fmt: skip
  table = [
    _linear(("code_embedding",), "tok_embeddings.weight", (c.vocab_size, D), False),
    _linear(("head",), "output.weight", (c.vocab_size, D), True),
    _copy(("norm",), "norm.weight", (D,)),
  ]
  if c.condition == "class":
    name, shape = "cls_embedding.embedding_table.weight", (c.num_classes + 1, D)
    table.append(_linear(("condition", "table"), name, shape, False))
  else:
    mlp, P, C = "cls_embedding.cap_proj", c.caption_tokens, c.caption_dim
    name = "cls_embedding.uncond_embedding"
    table += [
      _copy(("condition", "unconditional"), name, (P, C)),
      _linear(("condition", "in"), f"{mlp}.fc1.weight", (D, C), True),
      _linear(("condition", "out"), f"{mlp}.fc2.weight", (D, D), True),
    ]
  for i in range(c.layers):
    torch, ours = f"layers.{i}", ("layers",)
    attention, ffn = f"{torch}.attention", f"{torch}.feed_forward"
    layer = [
      _copy((*ours, "attention_norm"), f"{torch}.attention_norm.weight", (D,)),
      _copy((*ours, "ffn_norm"), f"{torch}.ffn_norm.weight", (D,)),
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
      _linear((*ours, "ffn", "out"), f"{ffn}.w2.weight", (D, F), True),
    ]
    table += [dataclasses.replace(e, layer=i, layers=c.layers) for e in layer]
  return table


def _copy(path, name, shape) -> Entry:
  return Entry(path, {name: shape}, lambda w: w, lambda p: (p,))


def _linear(path, name, shape, transpose: bool) -> Entry:
  if not transpose:
    return _copy(path, name, shape)
  return Entry(path, {name: shape}, lambda w: w.T, lambda p: (p.T,))


def _pack_qkv(K, G, H, w):
  """[(N + 2K) H, D], queries, keys, values -> [D, K, G + 2, H]."""
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
  """Channels (0, 1, 2, ..) of a head -> (0, 2, .., 1, 3, ..); see gpt/rope.py."""
  return np.concatenate([x_KGHD[:, :, 0::2], x_KGHD[:, :, 1::2]], axis=2)


def _pairs_from_halves(x_KGHD):
  halves = np.split(x_KGHD, 2, axis=2)
  return np.stack(halves, axis=3).reshape(x_KGHD.shape)


# Module names of ours -> the original's, applied in this order.
TOKENIZER_NAMES = (
  (r"level_(\d+)", r"conv_blocks.\1"),
  (r"(down|up)sample_(\d+)", r"conv_blocks.\2.\1sample.conv"),
  (r"(res|attn)_(\d+)", r"\1.\2"),
  (r"(kernel|scale)$", "weight"),
  (r"^codebook$", "quantize.embedding.weight"),
)


def _tokenizer_table(config: TokenizerConfig) -> list[Entry]:
  init = functools.partial(init_tokenizer, config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  table = []
  for path, leaf in flax.traverse_util.flatten_dict(unbox(shapes)).items():
    name = ".".join(path)
    for pattern, replacement in TOKENIZER_NAMES:
      name = re.sub(pattern, replacement, name)
    if len(leaf.shape) == 4:  # HWIO -> OIHW
      shape = tuple(leaf.shape[i] for i in (3, 2, 0, 1))
      pack, unpack = _hwio, lambda p: (p.transpose(3, 2, 0, 1),)
      table.append(Entry(path, {name: shape}, pack, unpack))
    else:
      table.append(_copy(path, name, leaf.shape))
  return table


def _hwio(w):
  return w.transpose(2, 3, 1, 0)
