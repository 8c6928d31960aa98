"""LlamaGen in JAX: autoregressive image generation with a plain Llama."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name: the module that it lives in.
HOMES = {
  "GPT": "gpt.model",
  "GPTConfig": "gpt.config",
  "SamplingConfig": "gpt.sampling_config",
  "TokenizerConfig": "tokenizer.config",
  "UserError": "errors",
  "VQModel": "tokenizer.model",
  "edit": "sampling.edit",
  "generate": "sampling.decode",
  "load_gpt": "weights.bundle",
  "load_tokenizer": "weights.bundle",
  "make_mesh": "parallel.mesh",
  "sample": "sampling.sample",
  "save_gpt": "weights.bundle",
  "save_tokenizer": "weights.bundle",
}
__all__ = [*HOMES, "weights"]


def __getattr__(name: str) -> Any:
  """Imports what is used: a command line that only fails should not wait for JAX."""
  if name == "weights":
    return importlib.import_module("llamagen_jax.weights")
  if name not in HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"llamagen_jax.{HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
