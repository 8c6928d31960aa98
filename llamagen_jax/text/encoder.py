"""A T5 encoder that is loaded: its parameters with its tokenizer."""

import dataclasses
from typing import Any

from llamagen_jax.text.t5 import T5Config
from llamagen_jax.text.tokens import CaptionTokens


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """A loaded T5 with its tokenizer."""

  config: T5Config
  params: Any
  tokens: CaptionTokens
  identity: str  # content hash; features and transformers name it
