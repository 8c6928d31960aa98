"""LlamaGen in JAX: autoregressive image generation with a plain Llama."""

from llamagen_jax import interop as interop
from llamagen_jax.bundle import (
  load_gpt as load_gpt,
)
from llamagen_jax.bundle import (
  load_tokenizer as load_tokenizer,
)
from llamagen_jax.bundle import (
  save_gpt as save_gpt,
)
from llamagen_jax.bundle import (
  save_tokenizer as save_tokenizer,
)
from llamagen_jax.errors import UserError as UserError
from llamagen_jax.gpt.config import GPTConfig as GPTConfig
from llamagen_jax.gpt.model import GPT as GPT
from llamagen_jax.sampling.config import SamplingConfig as SamplingConfig
from llamagen_jax.sampling.decode import generate as generate
from llamagen_jax.sampling.draw import sample as sample
from llamagen_jax.tokenizer.config import TokenizerConfig as TokenizerConfig
from llamagen_jax.tokenizer.model import VQModel as VQModel
from llamagen_jax.training.mesh import make_mesh as make_mesh

__version__ = "0.1.0"
