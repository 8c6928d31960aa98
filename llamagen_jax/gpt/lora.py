"""Low-rank adapters of the layers' matrices (LoRA, arXiv 2106.09685).

A matrix W becomes W + (alpha / rank) A B, with B zero at first.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import is_boxed

# Target: (path below params["layers"], axes of one layer's input).
TARGETS = {
  "qkv": (("attention", "qkv"), 1),
  "out": (("attention", "out"), 3),
  "ffn_in": (("ffn", "in"), 1),
  "ffn_out": (("ffn", "out"), 1),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Size of adapters, and the matrices that have some."""

  rank: int = 0  # 0 = no adapters
  alpha: float = 16.0  # adapters count alpha / rank
  targets: tuple[str, ...] = tuple(TARGETS)  # matrices of the layers

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists
    if self.rank < 0:
      raise UserError(f"lora.rank={self.rank}: expected a rank >= 0")
    if unknown := set(self.targets) - set(TARGETS):
      raise UserError(
        f"lora.targets: unknown {unknown.pop()!r}; expected of {', '.join(TARGETS)}"
      )


def init_adapters(config: LoRAConfig, params: Any, key: jax.Array) -> Any:
  """Returns fresh boxed adapters for a model's boxed or plain parameters."""
  adapters = {}
  for number, name in enumerate(config.targets):
    path, inputs = TARGETS[name]
    boxed = params["layers"][path[0]][path[1]]
    weight = boxed.value if is_boxed(boxed) else boxed
    names = boxed.names if is_boxed(boxed) else (None,) * weight.ndim
    layers, split = weight.shape[0], 1 + inputs
    a_shape = (layers, *weight.shape[1:split], config.rank)
    b_shape = (layers, config.rank, *weight.shape[split:])
    width = math.prod(weight.shape[1:split])
    a = jax.random.normal(jax.random.fold_in(key, number), a_shape) * width**-0.5
    adapters[name] = {
      "a": nn.LogicallyPartitioned(a, (*names[:split], None)),
      "b": nn.LogicallyPartitioned(
        jnp.zeros(b_shape, jnp.float32), (names[0], None, *names[split:])
      ),
    }
  return {"layers": adapters}


def add_adapters(config: LoRAConfig, params: Any, adapters: Any) -> Any:
  """Returns a model's parameters with the adapters added to their matrices."""
  layers = dict(params["layers"])
  for name, adapter in adapters["layers"].items():
    (block, leaf), _ = TARGETS[name]
    delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(
      adapter["a"], adapter["b"]
    )
    weight = layers[block][leaf] + config.alpha / config.rank * delta
    layers[block] = layers[block] | {leaf: weight}
  return params | {"layers": layers}
