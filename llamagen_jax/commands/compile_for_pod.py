"""Says what memory a config needs and how long it takes on a pod, without a pod.

The train step, the sampler or the engine of serving is compiled for a topology of TPU
chips, and the compiled program is counted: the memory that a chip needs, what it
computes, reads and writes, and exchanges. Needs the `libtpu` wheel and no TPU.

llamagen compile-for-pod --config=configs/c2i_imagenet.py:L,image_size=384 \\
    --topology=v5e:4x4
llamagen compile-for-pod --config=configs/c2i_imagenet.py:XL --topology=v5e:8x8 \\
    --search
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.metadata
import io
import pathlib
import sys

from llamagen_jax import storage
from llamagen_jax.commands import config_flag
from llamagen_jax.gpt.config import KV_CACHES
from llamagen_jax.options import option
from llamagen_jax.pod import topology
from llamagen_jax.pod.engine import compile_engine
from llamagen_jax.pod.process import run_apart
from llamagen_jax.pod.report import CompileReport, as_text
from llamagen_jax.pod.sampler import compile_sampler
from llamagen_jax.pod.search import HEADER, Trial, search
from llamagen_jax.pod.train_step import compile_train_step
from llamagen_jax.serving.engine import CHUNK
from llamagen_jax.sides import show_grid
from llamagen_jax.text.t5 import PRESETS, T5Config
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build
from llamagen_jax.weights.t5 import read_t5_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(config_flag.ConfigOptions):
  """Options of compile-for-pod."""

  topology: str = option(
    "chips to compile for: v5e:2x4, v5p:4x4x4; v5e:16x16x2 is two slices of 16x16",
    unit="CHIPS",
  )
  program: str = option(
    "a train step, the program of `sample`, or a chunk of steps of `serve`", "train",
    choices=("train", "sampler", "engine"),
  )  # fmt: skip
  step: int | None = option(
    "a step of the run, for recipes whose phases train by steps of their own, such as"
    " recipe=npp; default: the last", None, unit="STEP", at_least=0,
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
  window: int = option(
    "codes that a forward of the engine reads", 1, unit="CODES", at_least=1
  )
  kv_cache: str | None = option(
    "of the codes' keys and values in sampler or engine; default: the config's", None,
    choices=KV_CACHES,
  )  # fmt: skip
  t5: str | None = option(
    "size of the T5 that runs along in training; default: that of data.t5, if any",
    None, choices=tuple(PRESETS),
  )  # fmt: skip
  search: bool = option(
    "try meshes, recomputation and batch sizes of the train step, and rank them", False
  )
  quick: bool = option(
    "stop before machine code is made: a tenth of the time, but scratch memory of"
    " kernels, up to a third of the temporaries, is not counted",
    False,
  )
  json: str = option("file for the figures, too", "", unit="FILE")


def main(argv: Sequence[str]) -> None:
  values, config = config_flag.parse(
    Options, GPTRecipe, "compile-for-pod", argv, __doc__
  )
  recipe = build(GPTRecipe, config)
  grids = recipe.model.grids
  model = max(map(recipe.model.at, grids), key=lambda model: model.image_tokens)
  if len(grids) > 1:
    largest = show_grid(model.grid)
    print(f"of {len(grids)} grids the largest, {largest}", file=sys.stderr)
  model = model.for_backend("tpu")
  model = dataclasses.replace(model, kv_cache=values.kv_cache or model.kv_cache)
  recipe = dataclasses.replace(recipe, model=model)
  encoder = _encoder(recipe, values.t5)
  chips = topology.parse(values.topology).devices
  if values.search:

    def compile_one(recipe: GPTRecipe) -> CompileReport:
      return _compile(recipe, values, encoder, quiet=True)

    trials = search(recipe, chips, compile_one, sys.stderr)
    text = "\n".join([HEADER, *(trial.line() for trial in trials)])
    figures = _tried(trials)
  else:
    report = _compile(recipe, values, encoder)
    text = as_text(report.rows())
    figures = report.figures() | _compiled_with(values)
  print(text)
  if values.json:
    storage.write_json(storage.user_path(values.json), figures)


def _compile(
  recipe: GPTRecipe, values: Options, encoder: T5Config | None, quiet: bool = False
) -> CompileReport:
  """Compiles the program of the flags in a process of its own."""
  where, quick = values.topology, values.quick
  if values.program == "train":
    call = (compile_train_step, recipe, where, encoder, values.step, quick)
  elif values.program == "engine":
    shape = (values.batch_size, values.chunk, values.tensor)
    engine = functools.partial(compile_engine, window=values.window)
    call = (engine, recipe.model, *shape, where, quick)
  else:
    shape = (values.batch_size, values.tensor)
    call = (compile_sampler, recipe.model, recipe.sampling, *shape, where, quick)
  return run_apart(*call, news=io.StringIO() if quiet else sys.stderr)


def _compiled_with(values: Options) -> dict[str, str]:
  """Returns what was compiled, and by which versions, for tables of results."""
  return {
    "topology": values.topology,
    "program": values.program,
    "jax": importlib.metadata.version("jax"),
    "libtpu": importlib.metadata.version("libtpu"),
  }


def _tried(trials: Sequence[Trial]) -> list[dict]:
  return [
    {
      "mesh": dataclasses.asdict(t.recipe.mesh),
      "remat": t.recipe.model.remat,
      "batch_size": t.recipe.data.batch_size,
      "report": t.report.figures() if t.report else t.refusal,
    }
    for t in trials
  ]


def _encoder(recipe: GPTRecipe, size: str | None) -> T5Config | None:
  if size:
    return T5Config.preset(size, recipe.data.t5_dtype)
  if recipe.data.t5:
    return read_t5_config(pathlib.Path(recipe.data.t5), recipe.data.t5_dtype)
  return None
