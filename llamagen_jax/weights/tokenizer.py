"""VQ tokenizers of the original <-> ours."""

from collections.abc import Mapping
import functools
import re
from typing import Any

import flax
import jax

from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  copy,
  kernel,
  read_table,
  rename,
  shape_of,
  write_table,
)

# Module names of ours -> the original's, applied in this order.
TOKENIZER_NAMES = (
  (r"level_(\d+)", r"conv_blocks.\1"),
  (r"(down|up)sample_(\d+)", r"conv_blocks.\2.\1sample.conv"),
  (r"(res|attn)_(\d+)", r"\1.\2"),
  (r"(kernel|scale)$", "weight"),
  (r"^codebook$", "quantize.embedding.weight"),
)


def tokenizer_from_torch(
  state_dict: Mapping[str, Array], **changes
) -> tuple[TokenizerConfig, dict[str, Any]]:
  """Reads a VQ tokenizer of the original; see `gpt_from_torch`."""
  config = _tokenizer_config(state_dict, changes)
  return config, read_table(_tokenizer_table(config), state_dict)


def tokenizer_to_torch(
  config: TokenizerConfig, params: dict[str, Any]
) -> dict[str, Array]:
  """The inverse of `tokenizer_from_torch`."""
  return write_table(_tokenizer_table(config), params)


def _tokenizer_config(state_dict, changes) -> TokenizerConfig:
  codebook_size, codebook_dim = shape_of(state_dict, "quantize.embedding.weight", 2)
  width = shape_of(state_dict, "encoder.conv_in.weight", 4)[0]
  levels = {
    int(m[1]) for n in state_dict if (m := re.match(r"encoder\.conv_blocks\.(\d+)", n))
  }
  blocks = {
    m[1]
    for n in state_dict
    if (m := re.match(r"encoder\.conv_blocks\.0\.res\.(\d+)", n))
  }
  channels = [
    shape_of(state_dict, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0]
    for i in sorted(levels)
  ]
  fields = {
    "channel_multipliers": tuple(c // width for c in channels),
    "width": width,
    "res_blocks": len(blocks),
    "latent_width": shape_of(state_dict, "quant_conv.weight", 4)[1],
    "codebook_size": codebook_size,
    "codebook_dim": codebook_dim,
  }
  return TokenizerConfig(**(fields | changes))


def _tokenizer_table(config: TokenizerConfig) -> list[Entry]:
  init = functools.partial(init_tokenizer, config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  table = []
  for path, leaf in flax.traverse_util.flatten_dict(unbox(shapes)).items():
    entry = kernel if len(leaf.shape) == 4 else copy
    table.append(entry(path, rename(".".join(path), TOKENIZER_NAMES), leaf.shape))
  return table
