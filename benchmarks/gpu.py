"""What a GPU is asked for, in one table: sampling, a train step, the tokenizer.

python -m benchmarks.gpu                       # minutes, on one GPU
python -m benchmarks.gpu --only decode train   # a part of it
python -m benchmarks.gpu --dry-run             # anywhere: lowers each program for CUDA

Bounds are those of the card's data sheet (`parallel/chips.py`): a step of sampling
reads the weights and the written part of the cache once, the others multiply.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.chips import CHIPS, Chip
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.sampling.decode import DecodeInputs, decode_codes
from llamagen_jax.sampling.keys import as_keys, image_keys
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.training import gpt_step
from llamagen_jax.training.optimizer import OptimizerConfig
from llamagen_jax.training.recipe import MeshConfig, RunConfig

DECODED = [("B", 256), ("L", 256), ("L", 384), ("XL", 256), ("XL", 384)]
BATCHES = (1, 16, 64)  # images, two rows each with guidance
TRAINED = ("L", 256, 32)
KINDS = ("xla", "cudnn")
TOKENIZER_BATCH = 16
SAMPLING = SamplingConfig(guidance_scale=2.0, top_k=2000)
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Case:
  """A program, what it is called with, and its bound."""

  part: str  # decode | train | tokenizer
  name: str
  images: int  # of a call
  make: Callable[[], tuple[Callable, tuple]]  # a jitted function and its arguments
  bound: Callable[[Chip], float]  # least seconds of a call
  steps: int = 1  # of a call, for milliseconds a step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dry-run", action="store_true", help="measure nothing")
  parser.add_argument("--only", nargs="+", choices=("decode", "train", "tokenizer"))
  args = parser.parse_args()
  kind = jax.devices()[0].device_kind
  if not args.dry_run and jax.default_backend() != "gpu":
    parser.error(f"no GPU here, but {kind}: --dry-run lowers the programs for one")
  chip = CHIPS.get(kind)
  print(f"{kind if not args.dry_run else 'no GPU: not measured'}, bfloat16\n")
  print("| program | ms a step | images/s | share of the bound |\n|---|---|---|---|")
  rows = []
  for case in cases():
    if args.only and case.part not in args.only:
      continue
    rows.append(lowered(case) if args.dry_run else measured(case, chip))
    print(f"| {case.name} | {' | '.join(map(str, rows[-1]['cells']))} |", flush=True)
  print(json.dumps(rows))


def lowered(case: Case) -> dict[str, Any]:
  """Lowers a program for CUDA without any array; says what keeps it from it."""

  def make_abstract():
    call, arguments = case.make()
    lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    return len(lowered.as_text())

  try:
    found = f"lowers, {make_abstract() / 1e6:.1f} MB of StableHLO"
  except RuntimeError as error:  # JAX asks for cuDNN's version as it traces
    found = f"not lowered here: {error}"
  return {"name": case.name, "cells": ["not measured", "not measured", found]}


def measured(case: Case, chip: Chip | None) -> dict[str, Any]:
  """Runs a program on zeros, whose values do not change its speed."""
  call, arguments = case.make()
  zeros = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments)
  )
  arguments, run = zeros(), jax.jit(call)
  times = []
  for _ in range(REPEATS + 1):
    started = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    times.append(time.perf_counter() - started)
  seconds = float(np.median(times[1:]))
  share = f"{case.bound(chip) / seconds:.0%}" if chip else "card not known"
  cells = [f"{1e3 * seconds / case.steps:.2f}", f"{case.images / seconds:.1f}", share]
  return {"name": case.name, "cells": cells, "seconds": times}


def cases() -> Iterator[Case]:
  for preset, side in DECODED:
    for batch in BATCHES:
      yield decode_case(preset, side, batch)
  for kind in KINDS:
    yield train_case(*TRAINED, kind)
  for method in ("encode", "decode"):
    yield tokenizer_case(method)


def decode_case(preset: str, side: int, batch: int) -> Case:
  config = GPTConfig.preset(preset, image_size=side, dtype="bfloat16")
  params = jax.eval_shape(
    lambda key: decoding_params(config, unbox(init_gpt(config, key))), jax.random.key(0)
  )

  def make():
    def call(params, data, labels):
      settings = jax.tree.map(jnp.asarray, SAMPLING.for_batch(batch))
      inputs = DecodeInputs(params, as_keys(data), None, settings)
      return decode_codes(config, SAMPLING.active_filters, inputs, labels)

    data = jax.ShapeDtypeStruct(image_keys(0, range(batch)).shape, jnp.uint32)
    return call, (params, data, jax.ShapeDtypeStruct((batch,), jnp.int32))

  def bound(chip: Chip) -> float:
    read = {name: params[name] for name in ("layers", "head", "norm")}
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
    c, T = config, config.image_tokens
    cache = 2 * c.layers * c.num_kv_heads * c.head_dim * 2 * 2 * batch * T * T / 2
    return (weights * T + cache) / chip.hbm_bandwidth

  name = f"sample {preset} at {side}, {batch} images"
  return Case("decode", name, batch, make, bound, config.image_tokens)


def train_case(preset: str, side: int, batch: int, attention: str) -> Case:
  config = GPTConfig.preset(
    preset, image_size=side, dtype="bfloat16", attention=attention
  )
  recipe = gpt_step.GPTRecipe(
    model=config, data=gpt_step.CodeData("", "", batch),
    optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.05), sampling=SamplingConfig(),
    mesh=MeshConfig(), run=RunConfig(10, 0, 1, 0, 10, 1, 0),
  )  # fmt: skip

  def make():
    state = jax.eval_shape(
      lambda key: unbox(gpt_step.init_state(recipe, key)), jax.random.key(0)
    )
    codes = jax.ShapeDtypeStruct((batch, config.image_tokens), jnp.int32)
    data = {"codes": codes, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return functools.partial(gpt_step.train_step, recipe), (state, data)

  def bound(chip: Chip) -> float:
    return train_flops(config, batch) / chip.peak_flops

  return Case("train", f"train {preset} at {side}, {attention}", batch, make, bound)


def tokenizer_case(method: str) -> Case:
  config = dataclasses.replace(TokenizerConfig.preset("VQ-16"), dtype="bfloat16")
  params = jax.eval_shape(
    lambda key: unbox(model.init_tokenizer(config, key)), jax.random.key(0)
  )
  side, B = 256, TOKENIZER_BATCH
  given = {
    "encode": jax.ShapeDtypeStruct((B, side, side, 3), jnp.float32),
    "decode": jax.ShapeDtypeStruct((B, side // 16, side // 16), jnp.int32),
  }
  call = functools.partial(getattr(model, method), config)
  arguments = params, given[method]

  def bound(chip: Chip) -> float:
    return jax.jit(call).lower(*arguments).cost_analysis()["flops"] / chip.peak_flops

  name = f"VQ-16 {method}, {B} images of {side}"
  return Case("tokenizer", name, B, lambda: (call, arguments), bound)


if __name__ == "__main__":
  main()
