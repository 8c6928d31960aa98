"""Writes a bundle as a file of weights that the original LlamaGen loads.

llamagen export-weights --bundle=gpt/bundle --out=gpt.safetensors
"""

from collections.abc import Sequence
import dataclasses
import pathlib

import jax
import numpy as np

from llamagen_jax.commands import arguments
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.weights import bundle
from llamagen_jax.weights.files import write_weights
from llamagen_jax.weights.gpt import gpt_to_torch
from llamagen_jax.weights.tokenizer import tokenizer_to_torch

# The original's tokenizer counts the codes it used in a buffer, and insists on it.
USAGE_BUFFER = ("quantize.codebook_used", 65536)
SUFFIXES = (".pt", ".safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of export-weights."""

  bundle: str = option("of a transformer or a tokenizer", unit="FOLDER")
  out: str = option("x.pt or x.safetensors", unit="FILE")


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "export-weights", argv, __doc__)
  jax.config.update("jax_platforms", "cpu")  # a chip may be in another's hands
  out = pathlib.Path(args.out)
  if out.suffix not in SUFFIXES:
    raise UserError(
      f"--out={out}: expected a name that ends in {' or '.join(SUFFIXES)}"
    )
  if bundle.kind_of(args.bundle) == "gpt":
    gpt = bundle.load_gpt(args.bundle)
    state_dict = gpt_to_torch(gpt.config, gpt.params)
  else:
    tokenizer = bundle.load_tokenizer(args.bundle)
    state_dict = tokenizer_to_torch(tokenizer.config, tokenizer.params)
    name, size = USAGE_BUFFER
    state_dict[name] = np.zeros(size, np.float32)
  write_weights(out, state_dict)
  count = sum(value.size for value in state_dict.values())
  print(f"{out}: {len(state_dict)} tensors, {count / 1e6:.1f} M numbers")
