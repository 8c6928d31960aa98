"""Reads a published file of weights, and writes a bundle.

llamagen import-weights --list
llamagen import-weights --file=vq_ds16_c2i.pt --out=vq16
llamagen import-weights --file=c2i_L_384.pt --tokenizer=vq16 --out=c2i_L_384
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import jax

from llamagen_jax.commands import arguments, sampling_flags
from llamagen_jax.data.classes import imagenet_names
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import PRESETS
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import bundle, inception
from llamagen_jax.weights.files import Stored, read_weights
from llamagen_jax.weights.gpt import defer_gpt
from llamagen_jax.weights.published import PUBLISHED, Published, identify, table
from llamagen_jax.weights.tokenizer import tokenizer_from_torch

TOKENIZER_TENSOR = "quantize.embedding.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(sampling_flags.SamplingOverrides):
  """Options of import-weights."""

  list: bool = option("print the published checkpoints and stop", False)
  file: str | None = option("a .pt or .safetensors file", None, unit="FILE")
  hub: str | None = option(
    "download this published checkpoint from the Hugging Face hub", None, unit="NAME"
  )
  out: str | None = option("the new bundle", None, unit="FOLDER")
  tokenizer: str | None = option(
    "bundle of the tokenizer whose codes a transformer generates", None, unit="FOLDER"
  )
  model: str | None = option(
    "the published checkpoint it is, where its file name is another", None, unit="NAME"
  )
  image_size: int | None = option(
    "side of the images of a transformer that is not a published one", None,
    unit="PIXELS",
  )  # fmt: skip
  num_heads: int | None = option(
    "attention heads of a transformer of an unpublished size", None, unit="HEADS"
  )
  key: str | None = option(
    "entry of the file to take; default: ema, model, module, ..", None, unit="ENTRY"
  )


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "import-weights", argv, __doc__)
  jax.config.update("jax_platforms", "cpu")  # a chip may be in another's hands
  if args.list:
    print(table())
    return
  if bool(args.file) == bool(args.hub) or not args.out:
    raise UserError("expected --out and one of --file and --hub (or --list alone)")
  _check_name("--hub", args.hub)
  _check_name("--model", args.model)
  out = pathlib.Path(args.out)
  if (out / bundle.CONFIG).exists():
    raise UserError(f"--out={out} is a bundle already: choose another folder")

  if args.hub and not PUBLISHED[args.hub].is_tokenizer:
    _read_tokenizer(args)  # before a long download
  file = pathlib.Path(args.file) if args.file else download(args.hub)
  name = args.model or args.hub or identify(file)
  weights, key = read_weights(file, args.key)
  if TOKENIZER_TENSOR in weights:
    text = _import_tokenizer(weights, out)
  elif inception.SIGN in weights:
    bundle.save_judge(out, inception.KIND, inception.inception_from_torch(weights))
    text = "Inception of 2015-12-05, for llamagen evaluate --inception"
  else:
    text = _import_gpt(weights, out, name, args)
  print(f"{out}: {text}; from {file}" + (f", entry {key!r}" if key else ""))


def download(name: str) -> pathlib.Path:
  """The file of a published checkpoint, from the hub or the hub's local cache."""
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(
      "--hub needs huggingface_hub: pip install 'llamagen_jax[convert]'"
    ) from error
  repo, file = PUBLISHED[name].repo, f"{name}.pt"
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(repo, file))
  except OSError as error:
    reason = " ".join(str(error).split())[:300]
    raise UserError(
      f"--hub={name}: cannot get {file} of {repo}: {reason} -- download it where there"
      " is a network, and give it with --file"
    ) from error


def _check_name(flag: str, name: str | None) -> None:
  if name is not None and name not in PUBLISHED:
    raise UserError(f"{flag}={name}: expected one of {', '.join(PUBLISHED)}")


def _import_tokenizer(weights: Mapping[str, Stored], out: pathlib.Path) -> str:
  config, params = tokenizer_from_torch(weights)
  identity = bundle.save_tokenizer(out, config, params)
  return (
    f"tokenizer, downsampling {config.downsample}, {config.codebook_size} codes,"
    f" identity {identity[:12]}"
  )


def _read_tokenizer(args: Options) -> tuple[TokenizerConfig, str]:
  if not args.tokenizer:
    raise UserError(
      "--tokenizer is required for a transformer: the bundle of the tokenizer whose"
      " codes it draws, such as one imported from vq_ds16_c2i.pt"
    )
  return bundle.read_tokenizer_config(args.tokenizer)


def _import_gpt(
  weights: Mapping[str, Stored],
  out: pathlib.Path,
  name: str | None,
  args: Options,
) -> str:
  tokenizer_config, identity = _read_tokenizer(args)
  known = PUBLISHED.get(name)
  image_size = args.image_size or (known.image_size if known else None)
  if image_size is None:
    raise UserError(
      "the name of the file tells nothing about it: give --image-size, or --model with"
      " one of --list"
    )
  if image_size % tokenizer_config.downsample:
    raise UserError(
      f"--image-size={image_size} is not a multiple of the tokenizer's downsampling"
      f" {tokenizer_config.downsample}"
    )
  tokens = (image_size // tokenizer_config.downsample) ** 2
  config, params = defer_gpt(weights, num_heads=args.num_heads, image_tokens=tokens)
  shape = (config.layers, config.heads, config.dim)
  if known and shape != PRESETS.get(known.model):
    raise UserError(
      f"{name} is a {known.model}, (layers, heads, dim) {PRESETS.get(known.model)}; the"
      f" file holds {shape}: give another --model"
    )
  if config.vocab_size != tokenizer_config.codebook_size:
    raise UserError(
      f"the transformer draws {config.vocab_size} codes, --tokenizer={args.tokenizer}"
      f" has {tokenizer_config.codebook_size}"
    )
  sampling = dataclasses.replace(_best(known), **sampling_flags.given(args))
  named = config.condition == "class" and config.num_classes == 1000
  gpt = bundle.Transformer(
    config, params, sampling, identity, imagenet_names() if named else ()
  )
  bundle.save_gpt(out, gpt)
  return (
    f"transformer, {config.layers} layers of width {config.dim}, {config.condition}"
    f" conditions, {image_size}x{image_size} images, guidance"
    f" {sampling.guidance_scale:g}, top-k {sampling.top_k}"
  )


def _best(known: Published | None) -> SamplingConfig:
  return known.sampling if known else SamplingConfig()
