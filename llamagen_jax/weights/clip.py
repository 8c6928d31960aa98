"""A folder of CLIP as Hugging Face's transformers or open_clip lay it out -> ours.

Transformers: `config.json` and `model.safetensors` or `pytorch_model.bin`. open_clip:
`open_clip_config.json` and `open_clip_model.safetensors` or
`open_clip_pytorch_model.bin`. Each may be an index of several files; `.bin` needs the
extra `convert`. Either brings the tokenizer. Where a folder holds both, the first is
read.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

import flax
import numpy as np

from llamagen_jax import storage
from llamagen_jax.errors import UserError
from llamagen_jax.vision.clip import ClipConfig, TowerConfig, abstract_clip
from llamagen_jax.weights.files import read_folder
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  Names,
  copy,
  kernel,
  linear,
  read_table,
  rename,
)

# Mean and deviation of OpenAI's data; open_clip's weights are trained with them, too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Buffers, and tensors that only training needs.
UNUSED = ("logit_scale", "logit_bias", "position_ids", "attn_mask")


# Names of ours, with the number of the layer -> theirs, applied in this order.
TRANSFORMERS_NAMES: Names = (
  (r"^(text|vision)\.layers", r"\1_model.encoder.layers"),
  (r"^text\.embedding$", "text_model.embeddings.token_embedding.weight"),
  (r"^(text|vision)\.positions$", r"\1_model.embeddings.position_embedding.weight"),
  (r"^vision\.class_token$", "vision_model.embeddings.class_embedding"),
  (r"^vision\.patch$", "vision_model.embeddings.patch_embedding.weight"),
  (r"^vision\.first_norm_", "vision_model.pre_layrnorm_"),
  (r"^vision\.norm_", "vision_model.post_layernorm_"),
  (r"^text\.norm_", "text_model.final_layer_norm_"),
  (r"^text\.projection$", "text_projection.weight"),
  (r"^vision\.projection$", "visual_projection.weight"),
  (r"\.attention_norm_", ".layer_norm1_"),
  (r"\.ffn_norm_", ".layer_norm2_"),
  (r"\.qkv_", ".self_attn.{}_proj_"),
  (r"\.out_", ".self_attn.out_proj_"),
  (r"\.ffn_in_", ".mlp.fc1_"),
  (r"\.ffn_out_", ".mlp.fc2_"),
  (r"_(kernel|scale)$", ".weight"),
  (r"_bias$", ".bias"),
)
OPEN_CLIP_NAMES: Names = (
  (r"^text\.layers", "transformer.resblocks"),
  (r"^vision\.layers", "visual.transformer.resblocks"),
  (r"^text\.embedding$", "token_embedding.weight"),
  (r"^text\.positions$", "positional_embedding"),
  (r"^vision\.positions$", "visual.positional_embedding"),
  (r"^vision\.class_token$", "visual.class_embedding"),
  (r"^vision\.patch$", "visual.conv1.weight"),
  (r"^vision\.first_norm_", "visual.ln_pre_"),
  (r"^vision\.norm_", "visual.ln_post_"),
  (r"^text\.norm_", "ln_final_"),
  (r"^text\.projection$", "text_projection"),
  (r"^vision\.projection$", "visual.proj"),
  (r"\.attention_norm_", ".ln_1_"),
  (r"\.ffn_norm_", ".ln_2_"),
  (r"\.out_", ".attn.out_proj_"),
  (r"\.ffn_in_", ".mlp.c_fc_"),
  (r"\.ffn_out_", ".mlp.c_proj_"),
  (r"(?<!qkv)_(kernel|scale)$", ".weight"),
  (r"(?<!qkv)_bias$", ".bias"),
  (r"\.qkv_kernel$", ".attn.in_proj_weight"),
  (r"\.qkv_bias$", ".attn.in_proj_bias"),
)


def load_clip(folder: str | os.PathLike) -> tuple[ClipConfig, dict[str, Any]]:
  """Reads a folder; parameters are float32 numpy arrays.

  Raises:
    UserError: a file is missing, tensors do not fit, or the model is no plain CLIP.
  """
  folder = storage.user_path(folder)
  if (folder / "config.json").exists():
    config = _config(folder / "config.json", transformers_config)
    return config, clip_from_transformers(config, read_folder(folder))
  if not (folder / OPEN_CLIP).exists():
    raise UserError(
      f"{folder}: neither config.json nor {OPEN_CLIP}, so it is not a folder of CLIP"
    )
  config = _config(folder / OPEN_CLIP, open_clip_config)
  return config, clip_from_open_clip(config, read_folder(folder, OPEN_CLIP_FILES))


def _config(path, parse: Callable[[Mapping[str, Any]], ClipConfig]) -> ClipConfig:
  try:
    return parse(storage.read_json(path))
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"{path}: not a config of CLIP ({error!r})") from error


def transformers_config(fields: Mapping[str, Any]) -> ClipConfig:
  """Returns the shape from transformers' config.json, whose defaults fill the gaps."""
  if fields.get("model_type") != "clip":
    raise UserError(f"config.json: model_type {fields.get('model_type')!r}, not 'clip'")
  text = fields.get("text_config_dict") or fields.get("text_config") or {}
  vision = fields.get("vision_config_dict") or fields.get("vision_config") or {}
  activations = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
  if len(activations) > 1:
    raise UserError(f"config.json: the towers' activations differ, {activations}")

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
  """Returns the shape from open_clip_config.json.

  Raises:
    UserError: for an image tower that is no ViT, or a text tower that is not CLIP's.
  """
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
  """Returns the parameters of a state dict of transformers; strict about it."""
  return read_table(_table(config, TRANSFORMERS_NAMES), _used(tensors))


def clip_from_open_clip(config: ClipConfig, tensors: Mapping[str, Array]):
  """Returns the parameters of a state dict of open_clip or OpenAI; strict about it."""
  return read_table(_table(config, OPEN_CLIP_NAMES), _used(tensors))


def _used(tensors: Mapping[str, Array]) -> dict[str, Array]:
  return {n: v for n, v in tensors.items() if n.rpartition(".")[2] not in UNUSED}


def _table(config: ClipConfig, names: Names) -> list[Entry]:
  table = []
  for path, leaf in flax.traverse_util.flatten_dict(abstract_clip(config)).items():
    tower, *rest = path
    if rest[0] != "layers":
      table.append(_entry(path, rename(".".join(path), names), leaf.shape))
      continue
    layers, *shape = leaf.shape
    for i in range(layers):
      name = rename(f"{tower}.layers.{i}.{rest[1]}", names)
      entry = _entry(path, name, tuple(shape))
      table.append(dataclasses.replace(entry, layer=i, layers=layers))
  return table


def _entry(path: tuple[str, ...], name: str, shape: tuple[int, ...]) -> Entry:
  """Returns the entry of one array of ours of this shape, of a layer if it has some."""
  if "{}" in name:  # queries, keys and values are three tensors
    each = (shape[-1] // 3, *shape[:-1])
    return Entry(
      path, {name.format(x): each for x in "qkv"},
      lambda *tensors: np.concatenate(tensors).T, lambda p: tuple(np.split(p.T, 3)),
    )  # fmt: skip
  if len(shape) == 4:
    return kernel(path, name, shape)
  if path[-1].endswith("_kernel") or name.endswith("_projection.weight"):
    return linear(path, name, shape[::-1], True)
  return copy(path, name, shape)
