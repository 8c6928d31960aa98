"""What the verbs that draw images share: the flags of models and conditions."""

import dataclasses
from typing import NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from llamagen_jax.commands import sampling_flags
from llamagen_jax.data.classes import to_labels
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.config import KV_CACHES
from llamagen_jax.gpt.quantized import quantize_params
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.sampling.keys import check_seed
from llamagen_jax.sampling.prompts import Prompts, read_prompts
from llamagen_jax.sampling.sample import (
  Conditions,
  Labels,
  check_pair,
  restrict_to_codebook,
)
from llamagen_jax.storage import read_text, user_path
from llamagen_jax.training.export import load_run
from llamagen_jax.weights import bundle
from llamagen_jax.weights.adapter import apply_adapter
from llamagen_jax.weights.t5 import load_t5

FILES = (".png", ".npz")  # any other name is a folder's
OTHER_FILES = (
  ".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pdf", ".tiff", ".webp", ".zip",
)  # fmt: skip
EXAMPLES = "examples.txt"  # of a quickstart's folder: prompts for the demo, one a line


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(hosts.HostOptions, sampling_flags.SamplingOverrides):
  """Options of the models, and of what they draw."""

  gpt: str | None = option(
    "bundle of the transformer", None, unit="FOLDER", group="models"
  )
  workdir: str | None = option(
    "in place of --gpt: a run of train-gpt, of which the newest checkpoint is taken",
    None, unit="FOLDER", group="models",
  )  # fmt: skip
  adapter: str | None = option(
    "what a finetuned model adds to the transformer", None, unit="FOLDER",
    group="models",
  )  # fmt: skip
  tokenizer: str = option("bundle of the tokenizer", unit="FOLDER", group="models")
  t5: str | None = option(
    "the T5 that the transformer was trained with", None, unit="FOLDER", group="models"
  )
  classes: str | None = option(
    "indices, names and ranges: 207,360-362,'golden retriever'", None,
    group="images to generate",
  )  # fmt: skip
  classes_file: str | None = option(
    "the same in a file, also one a line", None, unit="FILE", group="images to generate"
  )
  prompts: tuple[str, ...] | None = option(
    "texts, in quotes", None, group="images to generate"
  )
  prompt_file: str | None = option(
    "the same: x.txt, a prompt a line, or x.csv or x.tsv and the column after a colon",
    None, unit="FILE", group="images to generate",
  )  # fmt: skip
  negative_prompt: str = option(
    "text that guidance leads away from", "", group="images to generate"
  )
  count: int = option(
    "images a class or prompt", 1, unit="IMAGES", at_least=1,
    group="images to generate",
  )  # fmt: skip
  seed: int = option("of the random numbers", 0, group="images to generate")
  tensor: int = option(
    "devices that share one model", 1, unit="DEVICES", at_least=1, group="computation"
  )
  dtype: str | None = option(
    "of the transformer's activations; default: float32 on CPU, else bfloat16", None,
    choices=("float32", "bfloat16"), group="computation",
  )  # fmt: skip
  weights: str = option(
    "of the transformer's matrices; int8 halves the bytes that a step in bfloat16"
    " reads, and changes the codes a little", "float", choices=("float", "int8"),
    group="computation",
  )  # fmt: skip
  kv_cache: str | None = option(
    "of the codes' keys and values; int8 nearly halves their bytes in bfloat16, and"
    " changes the codes a little; default: the bundle's, float", None,
    choices=KV_CACHES, group="computation",
  )  # fmt: skip


class Models(NamedTuple):
  """What the flags load."""

  gpt: bundle.Transformer
  tokenizer: bundle.Tokenizer
  sampling: SamplingConfig  # the bundle's own, overridden by flags
  mesh: Mesh
  dtype: str  # of activations


def check(args: GenerationOptions, *other_conditions: str) -> None:
  """Refuses options that no model could follow, before any model is read.

  Args:
    args: the options.
    other_conditions: fields that are given in place of classes or prompts.
  """
  if bool(args.gpt) == bool(args.workdir):
    raise UserError("expected either --gpt or --workdir")
  check_seed(args.seed, "--seed")
  SamplingConfig(**sampling_flags.given(args))
  names = ("classes", "classes_file", "prompts", "prompt_file", *other_conditions)
  if sum(bool(getattr(args, name)) for name in names) != 1:
    flags = [f"--{name.replace('_', '-')}" for name in names]
    raise UserError(f"expected one of {', '.join(flags[:-1])} and {flags[-1]}")


def check_out(name: str) -> None:
  """Refuses an --out that is no grid, no npz and no folder."""
  out = user_path(name)
  suffix = out.suffix
  if suffix not in FILES and suffix.lower() in (*FILES, *OTHER_FILES):
    raise UserError(
      f"--out={name}: expected a name that ends in .png or .npz, or a folder"
    )
  if suffix not in FILES and out.is_file():
    raise UserError(f"--out={name}: is a file, expected a folder")
  if suffix in FILES and out.is_dir():
    raise UserError(f"--out={name}: is a folder, expected a file")


def load_models(args: GenerationOptions) -> Models:
  """Loads the transformer, with its adapter, and its tokenizer, onto all devices."""
  mesh = make_mesh(tensor=args.tensor)
  dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  gpt = _load_gpt(args, mesh, dtype)
  tokenizer = bundle.load_tokenizer(args.tokenizer, mesh)
  check_pair(gpt, tokenizer)
  gpt = restrict_to_codebook(gpt, tokenizer)
  sampling = dataclasses.replace(gpt.sampling, **sampling_flags.given(args))
  sampling.check_model(gpt.config)
  return Models(gpt, tokenizer, sampling, mesh, dtype)


def for_decoding(gpt: bundle.Transformer, weights: str) -> bundle.Transformer:
  """Returns a transformer with parameters as decoding reads them, maybe in int8."""
  params = decoding_params(gpt.config, gpt.params)
  if weights == "int8":
    params = quantize_params(params)
  return dataclasses.replace(gpt, params=params)


def conditions(args: GenerationOptions, models: Models) -> Conditions:
  """Returns the conditions of all images that classes or prompts ask for."""
  gpt = models.gpt
  if not (args.prompts or args.prompt_file):
    return _labels(args, gpt)
  check_condition(args, gpt, "caption")
  if not args.t5:  # a bundle names its encoder, and does not hold it
    raise UserError("prompts need --t5, the folder of their text encoder")
  texts = args.prompts or read_prompts(args.prompt_file)
  encoder = load_t5(args.t5, dtype=models.dtype)
  repeated = tuple(text for text in texts for _ in range(args.count))
  return Prompts.of(gpt, encoder, repeated, args.negative_prompt)


def check_condition(
  args: GenerationOptions, gpt: bundle.Transformer, condition: str
) -> None:
  """Refuses classes for a model of captions, and the other way round."""
  if gpt.config.condition == condition:
    return
  given = f"--gpt={args.gpt}" if args.gpt else f"--workdir={args.workdir}"
  if condition == "caption":
    raise UserError(f"{given} is a model of classes: give --classes")
  raise UserError(f"{given} is a model of texts: give --prompts and --t5")


def _labels(args: GenerationOptions, gpt: bundle.Transformer) -> Labels:
  check_condition(args, gpt, "class")
  text = args.classes
  if args.classes_file:
    file = user_path(args.classes_file)
    if not file.exists():
      raise UserError(f"--classes-file={file}: no such file")
    text = read_text(file)
  labels = to_labels(text, gpt.class_names, gpt.config.num_classes)
  return Labels(np.repeat(np.array(labels, np.int32), args.count), gpt.class_names)


def _load_gpt(args: GenerationOptions, mesh: Mesh, dtype: str) -> bundle.Transformer:
  """Returns the transformer of --gpt or --workdir, with its --adapter."""
  if args.workdir:
    step, gpt = load_run(user_path(args.workdir), mesh=mesh)
    logging.info("the transformer is of step %d in %s", step, args.workdir)
    kv_cache = args.kv_cache or gpt.config.kv_cache
    config = dataclasses.replace(gpt.config, dtype=dtype, kv_cache=kv_cache)
    gpt = dataclasses.replace(gpt, config=config)
  else:
    gpt = bundle.load_gpt(args.gpt, mesh, dtype, args.kv_cache)
  return apply_adapter(args.adapter, gpt) if args.adapter else gpt
