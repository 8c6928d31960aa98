"""`llamagen compile-for-pod`: what a config does on a pod, before paying for one.

The real train step, or the real sampler, is compiled for a topology of TPU chips
that nobody here holds, and the compiled program says how much memory a chip needs,
what it computes, moves and exchanges. Needs the `libtpu` wheel and no TPU.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from absl import flags

from llamagen_jax.pod import topology
from llamagen_jax.pod.engine import compile_engine
from llamagen_jax.pod.report import CompileReport
from llamagen_jax.pod.sampler import compile_sampler
from llamagen_jax.pod.search import HEADER, Trial, search
from llamagen_jax.pod.train_step import compile_train_step
from llamagen_jax.serving.engine import CHUNK
from llamagen_jax.text.t5 import PRESETS, T5Config
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build, parse_config
from llamagen_jax.weights.t5 import read_t5_config


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string(
    "topology", None, "Chips to compile for: v5e:2x4, v5p:4x4x4 ..", flag_values=values
  )
  flags.DEFINE_enum(
    "program",
    "train",
    ["train", "sampler", "engine"],
    "What to compile: a train step, what `sample` runs, a chunk of what `serve` runs.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "images",
    32,
    "Drawn at once by sampler or engine on a data slot.",
    1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "tensor", 1, "Chips that share a model when they draw.", 1, flag_values=values
  )
  flags.DEFINE_integer(
    "chunk", CHUNK, "Steps between two joins in the engine.", 1, flag_values=values
  )
  flags.DEFINE_enum(
    "t5",
    None,
    list(PRESETS),
    "Size of the T5 that runs along in training; without it, the one in the folder"
    " data.t5, if that is given.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "search",
    False,
    "Try meshes, recomputation and batch sizes of the train step, and rank them.",
    flag_values=values,
  )
  flags.DEFINE_string("json", "", "File for the figures, too.", flag_values=values)
  config = parse_config("compile-for-pod", argv, values, required=("topology",))
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
  recipe: GPTRecipe, values: flags.FlagValues, encoder: T5Config | None
) -> CompileReport:
  if values.program == "train":
    return compile_train_step(recipe, values.topology, encoder)
  shared = values.tensor, values.topology
  if values.program == "engine":
    return compile_engine(recipe.model, values.images, values.chunk, *shared)
  return compile_sampler(recipe.model, recipe.sampling, values.images, *shared)
