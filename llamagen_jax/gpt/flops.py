"""FLOPs that a network needs, whatever a program spends.

The matmuls alone (PaLM, arXiv 2204.02311, appendix B): six a weight and token for a
train step, and attention's two products over the whole square of positions.
Recomputation, look-ups and element-wise work are not in it.
"""

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.text.t5 import T5Config


def products(config: GPTConfig) -> int:
  """Multiply-adds of an image's tokens with weights, in one forward pass.

  The layers see every token, the head those that predict a code, and the two layers
  of the caption's embedding the caption.
  """
  c = config
  qkv = c.dim * c.head_dim * (c.heads + 2 * c.num_kv_heads)
  layers = c.layers * (qkv + c.dim**2 + 3 * c.dim * c.ffn_dim)
  head = c.dim * c.vocab_size
  caption = c.dim * (c.caption_dim + c.dim) if c.condition == "caption" else 0
  return layers * c.length + head * c.image_tokens + caption * c.prefix_tokens


def train_flops(config: GPTConfig, batch_size: int) -> float:
  """Model FLOPs of one update."""
  c = config
  attention = 12 * c.layers * c.dim * c.length**2
  return float(batch_size * (6 * products(c) + attention))


def sampling_flops(config: GPTConfig, images: int, guidance: bool) -> float:
  """Returns the model FLOPs of sampling images: two a weight and token, and attention.

  A token attends to what came before it: half of the square.
  """
  c = config
  attention = 2 * c.layers * c.dim * c.length**2
  return float(images * (2 if guidance else 1) * (2 * products(c) + attention))


def t5_flops(config: T5Config, captions: int, tokens: int) -> float:
  """Model FLOPs of encoding captions that are padded to `tokens`."""
  c = config
  inner = c.heads * c.head_dim
  weights = 2 * c.layers * (4 * c.dim * inner + 3 * c.dim * c.ffn_dim) * tokens
  attention = 4 * c.layers * inner * tokens**2
  return float(captions * (weights + attention))
