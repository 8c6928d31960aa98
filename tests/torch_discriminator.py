"""Discriminators of the original <-> ours."""

from collections.abc import Mapping
import math
from typing import Any

from llamagen_jax.tokenizer.discriminator import (
  STYLEGAN_CHANNELS,
  STYLEGAN_HIDDEN,
  DiscriminatorConfig,
)
from llamagen_jax.weights.tables import (
  Array,
  Entry,
  conv,
  copy,
  linear,
  read_table,
  write_table,
)

# Not used: a discriminator always sees the statistics of its batch.
RUNNING = (".running_mean", ".running_var")


def discriminator_from_torch(
  config: DiscriminatorConfig, side: int, state_dict: Mapping[str, Array]
) -> dict[str, Any]:
  """Parameters of a discriminator for images of `side`."""
  state_dict = {n: v for n, v in state_dict.items() if not n.endswith(RUNNING)}
  return read_table(_table(config, side), state_dict)


def discriminator_to_torch(
  config: DiscriminatorConfig, side: int, params: dict[str, Any]
) -> dict[str, Array]:
  """The inverse of `discriminator_from_torch`, without running averages."""
  return write_table(_table(config, side), params)


def _table(config: DiscriminatorConfig, side: int) -> list[Entry]:
  if config.kind == "stylegan":
    return _stylegan(side)
  return _patchgan(config) if config.kind == "patchgan" else _blur_pool(config)


def _patchgan(c: DiscriminatorConfig) -> list[Entry]:
  widths = [3, *(c.width * min(2**i, 8) for i in range(c.layers + 1)), 1]
  table = []
  for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
    first, last = i == 0, i == c.layers + 1
    place = 0 if first else 3 * i - 1  # convolution, norm, LeakyReLU in a row
    name = "conv_out" if last else f"conv_{i}"
    bias = first or last
    table += conv((name,), f"main.{place}", (outputs, inputs, 4, 4), bias)
    if not bias:
      norm = f"main.{place + 1}"
      table.append(copy((f"norm_{i}", "scale"), f"{norm}.weight", (outputs,)))
      table.append(copy((f"norm_{i}", "bias"), f"{norm}.bias", (outputs,)))
  return table


def _blur_pool(c: DiscriminatorConfig) -> list[Entry]:
  table = conv(("conv_in",), "block_in.0", (c.width, 3, 5, 5))
  inputs = c.width
  for i in range(c.layers):
    outputs, block = c.width * 2**i, f"blocks.{i}"
    table += conv((f"conv_{i}",), f"{block}.0", (outputs, inputs, 3, 3))
    table.append(copy((f"norm_{i}", "scale"), f"{block}.2.weight", (outputs,)))
    table.append(copy((f"norm_{i}", "bias"), f"{block}.2.bias", (outputs,)))
    inputs = outputs
  table += conv(("hidden",), "to_logits.0", (inputs, inputs, 1, 1))
  return table + conv(("conv_out",), "to_logits.2", (1, inputs, 5, 5))


def _stylegan(side: int) -> list[Entry]:
  width = STYLEGAN_CHANNELS[side]
  table = conv(("conv_in",), "blocks.0", (width, 3, 3, 3))
  levels = int(math.log2(side)) - 2
  for i in range(levels):  # blocks.1 is the LeakyReLU after conv_in
    side, place = side // 2, f"blocks.{i + 2}"
    out, block = STYLEGAN_CHANNELS[side], f"block_{side}"
    table += conv((block, "shortcut"), f"{place}.conv_res", (out, width, 1, 1))
    table += conv((block, "conv1"), f"{place}.net.0", (out, width, 3, 3))
    table += conv((block, "conv2"), f"{place}.net.2", (out, out, 3, 3))
    table += conv((block, "downsample"), f"{place}.downsample.1", (out, out, 3, 3))
    width = out
  table += conv(("conv_out",), "final_conv.0", (width, width, 3, 3))
  for name, place, outputs, inputs in (
    ("hidden", "final_linear.0", STYLEGAN_HIDDEN, width * 16),
    ("logit", "final_linear.2", 1, STYLEGAN_HIDDEN),
  ):
    table.append(linear((name, "kernel"), f"{place}.weight", (outputs, inputs), True))
    table.append(copy((name, "bias"), f"{place}.bias", (outputs,)))
  return table
