"""Tokenizers of others <-> ours, a table of names for each layout."""

from collections.abc import Mapping
import functools
import itertools
import re
from typing import Any

import flax
import jax

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights.files import LOSSES
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  Names,
  copy,
  kernel,
  pointwise,
  read_table,
  rename,
  shape_of,
  write_table,
)

CODEBOOK = "quantize.embedding.weight"  # in every layout that has one
# Names that tell the layouts of continuous autoencoders, which have no codebook.
CONTINUOUS = {
  "kl": "encoder.mid.block_1.conv1.weight",
  "diffusers": "encoder.mid_block.resnets.0.conv1.weight",
}
# Names of ours -> theirs, applied in this order, after the levels of a decoder were
# numbered as theirs are.
COMMON: Names = (
  (r"(kernel|scale)$", "weight"),
  (r"^codebook$", CODEBOOK),
)
LLAMAGEN: Names = (
  (r"level_(\d+)", r"conv_blocks.\1"),
  (r"(down|up)sample_(\d+)", r"conv_blocks.\2.\1sample.conv"),
  (r"(res|attn)_(\d+)", r"\1.\2"),
  *COMMON,
)
DOWN_AND_UP: Names = (
  (r"^encoder\.level_(\d+)", r"encoder.down.\1"),
  (r"^decoder\.level_(\d+)", r"decoder.up.\1"),
  (r"\.res_(\d+)", r".block.\1"),
  (r"\.attn_(\d+)", r".attn.\1"),
  *COMMON,
)
TAMING: Names = (
  (r"\.downsample_(\d+)", r".down.\1.downsample.conv"),
  (r"\.upsample_(\d+)", r".up.\1.upsample.conv"),
  *DOWN_AND_UP,
  (r"\.mid\.0", ".mid.block_1"),
  (r"\.mid\.1", ".mid.attn_1"),
  (r"\.mid\.2", ".mid.block_2"),
)
MASKGIT: Names = ((r"\.upsample_(\d+)", r".up.\1.upsample_conv"), *DOWN_AND_UP)
DIFFUSERS: Names = (
  (r"^encoder\.level_(\d+)", r"encoder.down_blocks.\1"),
  (r"^decoder\.level_(\d+)", r"decoder.up_blocks.\1"),
  (r"\.downsample_(\d+)", r".down_blocks.\1.downsamplers.0.conv"),
  (r"\.upsample_(\d+)", r".up_blocks.\1.upsamplers.0.conv"),
  (r"\.res_(\d+)", r".resnets.\1"),
  (r"\.mid\.0", ".mid_block.resnets.0"),
  (r"\.mid\.1\.norm", ".mid_block.attentions.0.group_norm"),
  (r"\.mid\.1\.proj_out", ".mid_block.attentions.0.to_out.0"),
  (r"\.mid\.1\.", ".mid_block.attentions.0.to_"),
  (r"\.mid\.2", ".mid_block.resnets.1"),
  ("nin_shortcut", "conv_shortcut"),
  (r"\.norm_out", ".conv_norm_out"),
  *COMMON,
)
# Of files that older versions of diffusers wrote -> of those it writes now.
OLDER_DIFFUSERS: Names = (
  (r"\.query\.", ".to_q."),
  (r"\.key\.", ".to_k."),
  (r"\.value\.", ".to_v."),
  (r"\.proj_attn\.", ".to_out.0."),
)
NAMES = {
  "llamagen": LLAMAGEN, "taming": TAMING, "ibq": TAMING, "maskgit": MASKGIT,
  "kl": TAMING, "diffusers": DIFFUSERS,
}  # fmt: skip
KINDS = tuple(NAMES)
FROM_THE_LOWEST = ("llamagen", "diffusers")  # number a decoder's levels as we do
KL = {"l2_norm": False, "quantizer": "none", "codebook_size": 0}
# Fields that a kind's names and shapes do not tell.
FIELDS = {
  "llamagen": {},
  "taming": {"l2_norm": False},
  "ibq": {"l2_norm": False, "quantizer": "ibq"},
  "maskgit": {
    "l2_norm": False, "blocks": "maskgit", "quant_conv": False, "pixel_range": "unit",
  },
  "kl": KL,
  "diffusers": KL,
}  # fmt: skip
IBQ_BLOCKS = 4  # residual blocks a level in all published ones; VQGAN's have 2
EMA = "model_ema."  # averages of parameters, by their names without dots
FIRST_STAGE = "first_stage_model."  # before a tokenizer's names in a whole LDM's file


def tokenizer_kind(state_dict: Mapping[str, Any]) -> str | None:
  """Returns which of `KINDS` the names fit, or None for no tokenizer at all."""
  state_dict = first_stage(state_dict)
  if CODEBOOK not in state_dict:
    return next((k for k, name in CONTINUOUS.items() if name in state_dict), None)
  if "encoder.mid.0.conv1.weight" in state_dict and not any(
    name.startswith("encoder.conv_blocks.") for name in state_dict
  ):
    return "maskgit"
  if "encoder.mid.block_1.conv1.weight" in state_dict:
    blocks = _numbers(state_dict, r"encoder\.down\.0\.block\.(\d+)\.")
    return "ibq" if len(blocks) == IBQ_BLOCKS else "taming"
  return "llamagen"


def first_stage(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the tokenizer's tensors alone, of a latent diffusion model's file, too."""
  found = {
    name.removeprefix(FIRST_STAGE): value
    for name, value in state_dict.items()
    if name.startswith(FIRST_STAGE)
  }
  return found or state_dict


def tokenizer_from_torch(
  state_dict: Mapping[str, Array], kind: str | None = None, **changes
) -> tuple[TokenizerConfig, dict[str, Any]]:
  """Reads a tokenizer of codes or a continuous autoencoder.

  Images lie in [-1, 1] on our side for every kind.

  Args:
    state_dict: names -> arrays or torch tensors, PyTorch layouts. Loss networks, and
      all but the first stage of a latent diffusion model, are left aside; where
      averages of the parameters are there, they are taken.
    kind: whose layout it is, None = as the names say; "llamagen"; "taming" (VQGAN, and
      LDM's vq-f4 .. f16); "ibq"; "maskgit" (as TiTok and open-MUSE publish MaskGIT's
      VQGAN); "kl" (LDM's kl-f8 and the VAEs of Stable Diffusion and SDXL);
      "diffusers" (the same as `AutoencoderKL` of diffusers saves them).
    **changes: fields of `TokenizerConfig` that names and shapes cannot tell.

  Returns:
    The config and float32 parameters.

  Raises:
    UserError: with every missing, unexpected or misshapen tensor; with the one that
      tells a size, if that is missing; with values that are not finite.
  """
  kind = kind or tokenizer_kind(state_dict) or "llamagen"
  if kind not in KINDS:
    raise UserError(f"tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}")
  state_dict = _averaged(first_stage(state_dict))
  if kind == "diffusers":
    state_dict = {rename(n, OLDER_DIFFUSERS): value for n, value in state_dict.items()}
  config = _config(state_dict, kind, changes)
  return config, read_table(_table(config, kind), state_dict)


def tokenizer_to_torch(
  config: TokenizerConfig, params: dict[str, Any]
) -> dict[str, Array]:
  """Returns the tensors by LlamaGen's names, MaskGIT's or, of a VAE, LDM's."""
  kind = "kl" if config.continuous else "llamagen"
  kind = "maskgit" if config.blocks == "maskgit" else kind
  return write_table(_table(config, kind), params)


def _averaged(state_dict: Mapping[str, Array]) -> dict[str, Array]:
  """The model's own tensors, with their averages in their places."""
  own = {
    name: value
    for name, value in state_dict.items()
    if not name.startswith((EMA, LOSSES))
  }
  return {
    name: state_dict.get(EMA + name.replace(".", ""), value)
    for name, value in own.items()
  }


def _config(state_dict, kind: str, changes: Mapping[str, Any]) -> TokenizerConfig:
  def theirs(name: str) -> str:
    return rename(name, NAMES[kind])

  def count(pattern: str) -> int:
    """Returns how many parts of this name, numbered from 0, have a tensor."""
    found = (theirs(pattern.format(i)) for i in itertools.count())
    there = (any(name.startswith(part) for name in state_dict) for part in found)
    return sum(1 for _ in itertools.takewhile(bool, there))

  def channels(name: str) -> int:
    return shape_of(state_dict, theirs(name), 4)[0]

  width, levels = channels("encoder.conv_in.kernel"), count("encoder.level_{}.") or 1
  widths = [channels(f"encoder.level_{i}.res_0.conv1.kernel") for i in range(levels)]
  attention = count(f"encoder.level_{levels - 1}.attn_{{}}.")
  fields = {
    "blocks": "vqgan" if attention else "ldm",
    "channel_multipliers": tuple(c // width for c in widths),
    "width": width,
    "res_blocks": count("encoder.level_0.res_{}."),
    **_latents(state_dict, kind),
    **FIELDS[kind],
  }
  return TokenizerConfig(**(fields | changes))


def _latents(state_dict, kind: str) -> dict[str, Any]:
  """Returns the fields of what lies between encoder and decoder."""
  width = shape_of(state_dict, "encoder.conv_out.weight", 4)[0]
  if kind not in CONTINUOUS:
    size, dim = shape_of(state_dict, CODEBOOK, 2)
    return {"latent_width": width, "codebook_size": size, "codebook_dim": dim}
  quant_conv = "quant_conv.weight" in state_dict  # SD 3 has none
  dim = shape_of(state_dict, "quant_conv.weight", 4)[0] if quant_conv else width
  return {
    "latent_width": width // 2, "codebook_dim": dim // 2, "quant_conv": quant_conv,
  }  # fmt: skip


def _numbers(names: Mapping[str, Any], pattern: str) -> list[int]:
  return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})


def _table(config: TokenizerConfig, kind: str) -> list[Entry]:
  init = functools.partial(init_tokenizer, config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  table = []
  for path, leaf in flax.traverse_util.flatten_dict(unbox(shapes)).items():
    name = ".".join(path)
    if kind not in FROM_THE_LOWEST:
      name = _from_the_highest(name, len(config.channel_multipliers))
    name = rename(name, NAMES[kind])
    entry = kernel if len(leaf.shape) == 4 else copy
    if kind == "diffusers" and re.search(r"\.to_.*weight$", name):
      entry = pointwise  # its attention has linear layers
    table.append(entry(path, name, leaf.shape))
  return table


def _from_the_highest(name: str, levels: int) -> str:
  """Numbers a decoder's levels from the highest resolution; ours from the lowest."""
  return re.sub(
    r"(?<=^decoder\.)(level|upsample)_(\d+)",
    lambda found: f"{found[1]}_{levels - 1 - int(found[2])}",
    name,
  )
