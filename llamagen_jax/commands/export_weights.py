"""Writes a bundle as a file of weights that the original LlamaGen loads.

The file also holds our config, so that import-weights reads every exported model.

llamagen export-weights --bundle=gpt/bundle --out=gpt.safetensors
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from llamagen_jax import storage
from llamagen_jax.commands import arguments
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.weights import bundle
from llamagen_jax.weights.files import check_suffix, write_weights
from llamagen_jax.weights.gpt import gpt_to_torch
from llamagen_jax.weights.tokenizer import CODEBOOK, tokenizer_to_torch

# The original's tokenizer counts the codes it used in a buffer, and insists on it.
USAGE_BUFFER = ("quantize.codebook_used", 65536)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of export-weights."""

  bundle: str = option("of a transformer or a tokenizer", unit="FOLDER")
  out: str = option("x.pt or x.safetensors", unit="FILE")


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "export-weights", argv, __doc__)
  out = storage.user_path(args.out)
  check_suffix(out, f"--out={out}")
  with hosts.cpu_only():
    state_dict, extra = _read(args.bundle)
    write_weights(out, state_dict, extra)
  count = sum(value.size for value in state_dict.values())
  print(f"{out}: {len(state_dict)} tensors, {count / 1e6:.1f} M numbers")


def _read(path: str):
  """Returns a bundle's tensors by the original's names, and its settings."""
  kind = bundle.kind_of(path)
  if kind == "gpt":
    gpt = bundle.load_gpt(path)
    extra = {
      "config": dataclasses.asdict(gpt.config),
      "sampling": dataclasses.asdict(gpt.sampling),
      "class_names": gpt.class_names,
      "text_encoder": gpt.text_encoder,
    }
    return gpt_to_torch(gpt.config, gpt.params), extra
  if kind != "tokenizer":
    raise UserError(f"--bundle={path} is a {kind}: expected a transformer or tokenizer")
  tokenizer = bundle.load_tokenizer(path)
  state_dict = tokenizer_to_torch(tokenizer.config, tokenizer.params)
  if CODEBOOK in state_dict and tokenizer.config.blocks != "maskgit":
    name, size = USAGE_BUFFER
    state_dict[name] = np.zeros(size, np.float32)
  return state_dict, {"config": dataclasses.asdict(tokenizer.config)}
