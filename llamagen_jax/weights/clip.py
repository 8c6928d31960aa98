"""A folder of CLIP as Hugging Face's transformers or open_clip lay it out -> ours.

Transformers: `config.json` and `model.safetensors` (or its index of several files, or
`pytorch_model.bin` with the extra `convert`). open_clip: `open_clip_config.json` and
`open_clip_model.safetensors` (or `open_clip_pytorch_model.bin`). Either brings the
tokenizer. Where a folder holds both, the first is read.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.vision.clip import ClipConfig, TowerConfig
from llamagen_jax.weights.files import read_weights
from llamagen_jax.weights.t5 import read_tensors
from llamagen_jax.weights.tables import Array, Entry, copy, linear, read_table

# Of OpenAI's data, which open_clip's weights are normalised by, too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Buffers and what only training needs.
UNUSED = ("logit_scale", "logit_bias", "position_ids", "attn_mask")


def load_clip(folder: str | pathlib.Path) -> tuple[ClipConfig, dict[str, Any]]:
  """Reads a folder; parameters are float32 numpy arrays.

  Raises:
    UserError: a file is missing, tensors do not fit, or the model is no plain CLIP.
  """
  folder = pathlib.Path(folder)
  if (folder / "config.json").exists():
    config = transformers_config(_json(folder / "config.json"))
    return config, clip_from_transformers(config, read_tensors(folder))
  if not (folder / OPEN_CLIP).exists():
    raise UserError(
      f"{folder}: neither config.json nor {OPEN_CLIP}, so it is not a folder of CLIP"
    )
  config = open_clip_config(_json(folder / OPEN_CLIP))
  for name in OPEN_CLIP_FILES:
    if (folder / name).exists():
      return config, clip_from_open_clip(config, read_weights(folder / name)[0])
  raise UserError(f"{folder}: no weights; expected {' or '.join(OPEN_CLIP_FILES)}")


def transformers_config(fields: Mapping[str, Any]) -> ClipConfig:
  """config.json of transformers, whose missing fields have that library's defaults."""
  if fields.get("model_type") != "clip":
    raise UserError(f"config.json: model_type {fields.get('model_type')!r}, not 'clip'")
  text = fields.get("text_config_dict") or fields.get("text_config") or {}
  vision = fields.get("vision_config_dict") or fields.get("vision_config") or {}
  activations = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
  if len(activations) > 1:
    raise UserError(f"config.json: towers of other activations, {activations}")

  def tower(part, width, heads):
    width = part.get("hidden_size", width)
    return TowerConfig(
      part.get("num_hidden_layers", 12), width, part.get("num_attention_heads", heads),
      part.get("intermediate_size", 4 * width),
    )  # fmt: skip

  return ClipConfig(
    text=tower(text, 512, 8),
    vision=tower(vision, 768, 12),
    embedding_dim=fields.get("projection_dim", 512),
    vocab_size=text.get("vocab_size", 49408),
    context=text.get("max_position_embeddings", 77),
    image_size=vision.get("image_size", 224),
    patch=vision.get("patch_size", 32),
    activation=activations.pop(),
    mean=MEAN,
    deviation=DEVIATION,
  )


def open_clip_config(fields: Mapping[str, Any]) -> ClipConfig:
  """open_clip_config.json; a model other than a ViT with a CLIP text is refused."""
  model, prepared = fields["model_cfg"], fields.get("preprocess_cfg", {})
  text, vision = model["text_cfg"], model["vision_cfg"]
  if not isinstance(vision.get("layers"), int) or "hf_model_name" in text:
    raise UserError(f"{OPEN_CLIP}: not a vision transformer with CLIP's own text tower")

  def tower(part, heads):
    ratio = part.get("mlp_ratio", 4.0)
    return TowerConfig(
      part["layers"], part["width"], heads, int(part["width"] * ratio)
    )  # fmt: skip

  return ClipConfig(
    text=tower(text, text["heads"]),
    vision=tower(vision, vision["width"] // vision.get("head_width", 64)),
    embedding_dim=model["embed_dim"],
    vocab_size=text["vocab_size"],
    context=text["context_length"],
    image_size=vision["image_size"],
    patch=vision["patch_size"],
    activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    mean=prepared.get("mean", MEAN),
    deviation=prepared.get("std", DEVIATION),
  )


def clip_from_transformers(config: ClipConfig, tensors: Mapping[str, Array]):
  """Strict about names and shapes."""
  c, text, vision = config, "text_model", "vision_model"
  side = (c.image_size // c.patch) ** 2 + 1
  table = [
    copy(("text", "embedding"), f"{text}.embeddings.token_embedding.weight",
         (c.vocab_size, c.text.width)),
    copy(("text", "positions"), f"{text}.embeddings.position_embedding.weight",
         (c.context, c.text.width)),
    *_norm(("text", "norm"), f"{text}.final_layer_norm", c.text.width),
    linear(("text", "projection"), "text_projection.weight",
           (c.embedding_dim, c.text.width), True),
    _patch(c, f"{vision}.embeddings.patch_embedding.weight"),
    copy(("vision", "class_token"), f"{vision}.embeddings.class_embedding",
         (c.vision.width,)),
    copy(("vision", "positions"), f"{vision}.embeddings.position_embedding.weight",
         (side, c.vision.width)),
    *_norm(("vision", "first_norm"), f"{vision}.pre_layrnorm", c.vision.width),
    *_norm(("vision", "norm"), f"{vision}.post_layernorm", c.vision.width),
    linear(("vision", "projection"), "visual_projection.weight",
           (c.embedding_dim, c.vision.width), True),
  ]  # fmt: skip
  for place, tower in (("text", c.text), ("vision", c.vision)):
    for i in range(tower.layers):
      name, path, D = (
        f"{place}_model.encoder.layers.{i}",
        (place, "layers"),
        tower.width,
      )
      attention = [f"{name}.self_attn.{x}_proj" for x in "qkv"]
      layer = [
        *_norm((*path, "attention_norm"), f"{name}.layer_norm1", D),
        *_norm((*path, "ffn_norm"), f"{name}.layer_norm2", D),
        Entry((*path, "qkv_kernel"), {f"{x}.weight": (D, D) for x in attention},
              lambda *ws: np.concatenate(ws).T, lambda p: np.split(p.T, 3)),
        Entry((*path, "qkv_bias"), {f"{x}.bias": (D,) for x in attention},
              lambda *bs: np.concatenate(bs), lambda p: np.split(p, 3)),
        *_dense((*path, "out"), f"{name}.self_attn.out_proj", (D, D)),
        *_dense((*path, "ffn_in"), f"{name}.mlp.fc1", (tower.ffn_dim, D)),
        *_dense((*path, "ffn_out"), f"{name}.mlp.fc2", (D, tower.ffn_dim)),
      ]  # fmt: skip
      table += [dataclasses.replace(e, layer=i, layers=tower.layers) for e in layer]
  return read_table(table, _used(tensors))


def clip_from_open_clip(config: ClipConfig, tensors: Mapping[str, Array]):
  """Strict about names and shapes; OpenAI's own names are the same."""
  c = config
  side = (c.image_size // c.patch) ** 2 + 1
  table = [
    copy(("text", "embedding"), "token_embedding.weight", (c.vocab_size, c.text.width)),
    copy(("text", "positions"), "positional_embedding", (c.context, c.text.width)),
    *_norm(("text", "norm"), "ln_final", c.text.width),
    copy(("text", "projection"), "text_projection", (c.text.width, c.embedding_dim)),
    _patch(c, "visual.conv1.weight"),
    copy(("vision", "class_token"), "visual.class_embedding", (c.vision.width,)),
    copy(("vision", "positions"), "visual.positional_embedding",
         (side, c.vision.width)),
    *_norm(("vision", "first_norm"), "visual.ln_pre", c.vision.width),
    *_norm(("vision", "norm"), "visual.ln_post", c.vision.width),
    copy(("vision", "projection"), "visual.proj", (c.vision.width, c.embedding_dim)),
  ]  # fmt: skip
  for place, prefix, tower in (("text", "", c.text), ("vision", "visual.", c.vision)):
    for i in range(tower.layers):
      name, path = f"{prefix}transformer.resblocks.{i}", (place, "layers")
      D, attention = tower.width, f"{prefix}transformer.resblocks.{i}.attn"
      layer = [
        *_norm((*path, "attention_norm"), f"{name}.ln_1", D),
        *_norm((*path, "ffn_norm"), f"{name}.ln_2", D),
        linear((*path, "qkv_kernel"), f"{attention}.in_proj_weight", (3 * D, D), True),
        copy((*path, "qkv_bias"), f"{attention}.in_proj_bias", (3 * D,)),
        *_dense((*path, "out"), f"{attention}.out_proj", (D, D)),
        *_dense((*path, "ffn_in"), f"{name}.mlp.c_fc", (tower.ffn_dim, D)),
        *_dense((*path, "ffn_out"), f"{name}.mlp.c_proj", (D, tower.ffn_dim)),
      ]
      table += [dataclasses.replace(e, layer=i, layers=tower.layers) for e in layer]
  return read_table(table, _used(tensors))


def _used(tensors: Mapping[str, Array]) -> dict[str, Array]:
  return {n: v for n, v in tensors.items() if n.rpartition(".")[2] not in UNUSED}


def _norm(path: tuple[str, ...], name: str, width: int) -> list[Entry]:
  *place, last = path
  return [
    copy((*place, f"{last}_scale"), f"{name}.weight", (width,)),
    copy((*place, f"{last}_bias"), f"{name}.bias", (width,)),
  ]


def _dense(path: tuple[str, ...], name: str, shape: tuple[int, int]) -> list[Entry]:
  *place, last = path
  return [
    linear((*place, f"{last}_kernel"), f"{name}.weight", shape, True),
    copy((*place, f"{last}_bias"), f"{name}.bias", shape[:1]),
  ]


def _patch(config: ClipConfig, name: str) -> Entry:
  shape = (config.vision.width, 3, config.patch, config.patch)
  return Entry(
    ("vision", "patch"), {name: shape},
    lambda w: w.transpose(2, 3, 1, 0), lambda p: (p.transpose(3, 2, 0, 1),),
  )  # fmt: skip


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error})") from error
