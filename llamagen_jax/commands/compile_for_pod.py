"""Says what a config needs and does on a pod, before paying for one.

The real train step, or the real sampler, is compiled for a topology of TPU chips
that nobody here holds, and the compiled program says how much memory a chip needs,
what it computes, moves and exchanges. Needs the `libtpu` wheel and no TPU.

llamagen compile-for-pod --config=configs/c2i_imagenet.py:L,image_size=384 \\
    --topology=v5e:4x4
llamagen compile-for-pod --config=configs/c2i_imagenet.py:XL --topology=v5e:8x8 \\
    --search
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

import jax

from llamagen_jax.commands import config_flag
from llamagen_jax.options import option
from llamagen_jax.pod import topology
from llamagen_jax.pod.engine import compile_engine
from llamagen_jax.pod.report import CompileReport
from llamagen_jax.pod.sampler import compile_sampler
from llamagen_jax.pod.search import HEADER, Trial, search
from llamagen_jax.pod.train_step import compile_train_step
from llamagen_jax.serving.engine import CHUNK
from llamagen_jax.text.t5 import PRESETS, T5Config
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build
from llamagen_jax.weights.t5 import read_t5_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(config_flag.ConfigOptions):
  """Options of compile-for-pod."""

  topology: str = option("chips to compile for: v5e:2x4, v5p:4x4x4 ..", unit="CHIPS")
  program: str = option(
    "a train step, the program of `sample`, or a chunk of steps of `serve`", "train",
    choices=("train", "sampler", "engine"),
  )  # fmt: skip
  batch_size: int = option(
    "images at a time in sampler or engine, a data slot", 32, unit="IMAGES", at_least=1
  )
  tensor: int = option(
    "chips that share one model in sampler or engine", 1, unit="CHIPS", at_least=1
  )
  chunk: int = option(
    "steps of the engine between two moments at which requests join", CHUNK,
    unit="STEPS", at_least=1,
  )  # fmt: skip
  t5: str | None = option(
    "size of the T5 that runs along in training; default: that of data.t5, if any",
    None, choices=tuple(PRESETS),
  )  # fmt: skip
  search: bool = option(
    "try meshes, recomputation and batch sizes of the train step, and rank them", False
  )
  json: str = option("file for the figures, too", "", unit="FILE")


def main(argv: Sequence[str]) -> None:
  values, config = config_flag.parse(
    Options, GPTRecipe, "compile-for-pod", argv, __doc__
  )
  # A program for chips that are not here cannot be read back (JAX 0.10.2).
  jax.config.update("jax_enable_compilation_cache", False)
  recipe = build(GPTRecipe, config)
  encoder = _encoder(recipe, values.t5)
  if values.search:
    with topology.quiet() as errors:
      trials = search(recipe, values.topology, errors, encoder)
    lines, figures = [HEADER, *(trial.line() for trial in trials)], _tried(trials)
  else:
    with topology.quiet():
      verdict = judge(recipe, values, encoder)
    lines, figures = verdict.lines(), verdict.figures()
  print("\n".join(lines))
  if values.json:
    with open(values.json, "w") as file:
      json.dump(figures, file, indent=1)


def _tried(trials: Sequence[Trial]) -> list[dict]:
  return [
    {
      "mesh": dataclasses.asdict(t.recipe.mesh),
      "remat": t.recipe.model.remat,
      "batch_size": t.recipe.data.batch_size,
      "verdict": t.verdict.figures() if t.verdict else t.refusal,
    }
    for t in trials
  ]


def _encoder(recipe: GPTRecipe, size: str | None) -> T5Config | None:
  if size:
    return T5Config.preset(size, recipe.data.t5_dtype)
  if recipe.data.t5:
    return read_t5_config(pathlib.Path(recipe.data.t5), recipe.data.t5_dtype)
  return None


def judge(
  recipe: GPTRecipe, values: Options, encoder: T5Config | None
) -> CompileReport:
  if values.program == "train":
    return compile_train_step(recipe, values.topology, encoder)
  shared = values.tensor, values.topology
  if values.program == "engine":
    return compile_engine(recipe.model, values.batch_size, values.chunk, *shared)
  return compile_sampler(recipe.model, recipe.sampling, values.batch_size, *shared)
