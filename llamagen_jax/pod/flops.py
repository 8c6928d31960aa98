"""FLOPs that a transformer needs, whatever a program spends.

The matmuls alone (PaLM, arXiv 2204.02311, appendix B): six a weight and token for a
train step, and attention's two products over the whole square of positions.
Recomputation, look-ups and element-wise work are not in it.
"""

from llamagen_jax.gpt.config import GPTConfig


def matmul_weights(config: GPTConfig) -> int:
  """Weights that every token is multiplied with: layers and head."""
  c = config
  qkv = c.dim * c.head_dim * (c.heads + 2 * c.num_kv_heads)
  return c.layers * (qkv + c.dim**2 + 3 * c.dim * c.ffn_dim) + c.dim * c.vocab_size


def train_flops(config: GPTConfig, batch_size: int) -> float:
  """Model FLOPs of one update."""
  c = config
  weights = 6 * matmul_weights(c) * c.length
  attention = 12 * c.layers * c.dim * c.length**2
  return float(batch_size * (weights + attention))
