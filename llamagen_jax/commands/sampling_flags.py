"""The settings of `SamplingConfig` as command-line flags."""

import argparse
import dataclasses
from typing import Any

from llamagen_jax.gpt.sampling_config import SCHEDULES, SamplingConfig

HELP = {
  "guidance_scale": "strength of classifier-free guidance; 1 = off",
  "guidance_schedule": f"its course over an image: {', '.join(SCHEDULES)}",
  "guidance_power": "of the power-cosine schedule",
  "guidance_start": "no guidance for that many codes at the start of an image",
  "guidance_stop": "no guidance after this decode step; -1 = never stop",
  "guidance_beta": "strength of a model trained without guidance, about 1 / scale",
  "temperature": "logits are divided by it",
  "top_k": "sample from the k most probable codes; 0 = off",
  "top_p": "sample from the nucleus of this mass; 1 = off",
  "greedy": "the most probable code, always",
  "window": "codes that a forward reads; the codes stay the same, up to rounding",
}


def add_sampling_flags(parser: argparse.ArgumentParser, default: str) -> None:
  """One flag a field; one that is not given leaves the default in force."""
  group = parser.add_argument_group(f"sampling, by default {default}")
  for field in dataclasses.fields(SamplingConfig):
    name, text = "--" + field.name.replace("_", "-"), HELP[field.name]
    if field.type is bool:
      group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    else:
      group.add_argument(name, type=field.type, help=text)


def given(args: argparse.Namespace) -> dict[str, Any]:
  """The fields of `SamplingConfig` that the command line names."""
  values = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplingConfig)}
  return {name: value for name, value in values.items() if value is not None}
