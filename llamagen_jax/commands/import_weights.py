"""Reads a file of weights, and writes a bundle.

LlamaGen's transformers and tokenizers and what succeeded them; the tokenizers of VQGAN
(taming), LDM, IBQ and MaskGIT; the VAEs of Stable Diffusion and SDXL, which have no
codes, to compare with; Inception.

llamagen import-weights --list
llamagen import-weights --file=vq_ds16_c2i.pt --out=vq16
llamagen import-weights --file=c2i_L_384.pt --tokenizer=vq16 --out=c2i_L_384
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath

from llamagen_jax import storage
from llamagen_jax.commands import arguments, sampling_flags
from llamagen_jax.data.classes import imagenet_names
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import PRESETS, GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.sides import Sides, grid_of, image_size_of, show_pixels
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import bundle, hub, inception
from llamagen_jax.weights.files import Stored, read_weights
from llamagen_jax.weights.gpt import EMBEDDING, defer_gpt
from llamagen_jax.weights.published import PUBLISHED, Published, identify, table
from llamagen_jax.weights.tokenizer import (
  CODEBOOK,
  KINDS,
  tokenizer_from_torch,
  tokenizer_kind,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(sampling_flags.SamplingOverrides):
  """Options of import-weights."""

  list: bool = option("print the published checkpoints and stop", False)
  file: str | None = option(
    "a .pt, .ckpt, .bin or .safetensors file, or an index of several", None, unit="FILE"
  )
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
  image_size: Sides | None = option(
    "SIDE or WIDTHxHEIGHT of the images of a transformer that is not a published one",
    None, unit="PIXELS",
  )  # fmt: skip
  num_heads: int | None = option(
    "attention heads of a transformer of an unpublished size", None, unit="HEADS"
  )
  key: str | None = option(
    "entry of a pickle to take, with dots between nested ones; default: ema, model,"
    " module, state_dict", None, unit="ENTRY",
  )  # fmt: skip
  kind: str | None = option(
    "read the file as a tokenizer of this layout; default: as its names say",
    None,
    choices=KINDS,
  )


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "import-weights", argv, __doc__)
  if args.list:
    print(table())
    return
  _check(args)
  out = storage.user_path(args.out)
  existed = out.exists()
  with hosts.cpu_only():
    try:
      print(f"{out}: {_import(args, out)}")
    except BaseException:
      if not existed and out.exists():
        out.rmtree()
      raise


def _check(args: Options) -> None:
  if bool(args.file) == bool(args.hub) or not args.out:
    raise UserError("expected --out and one of --file and --hub (or --list alone)")
  for flag, name in (("--hub", args.hub), ("--model", args.model)):
    if name is not None and name not in PUBLISHED:
      raise UserError(f"{flag}={name}: expected one of {', '.join(PUBLISHED)}")
  if (storage.user_path(args.out) / bundle.CONFIG).exists():
    raise UserError(f"--out={args.out} is a bundle already: choose another folder")
  if args.hub and not PUBLISHED[args.hub].is_tokenizer:
    _read_tokenizer(args)  # before a long download


def _import(args: Options, out: epath.Path) -> str:
  """Writes the bundle and returns a description of it."""
  file = storage.user_path(args.file) if args.file else download(args.hub)
  weights, key, extra = read_weights(file, args.key)
  if args.kind or tokenizer_kind(weights):
    text = _import_tokenizer(weights, extra, out, args)
  elif inception.SIGN in weights:
    bundle.save_judge(out, inception.KIND, inception.inception_from_torch(weights))
    text = "Inception of 2015-12-05, for llamagen evaluate --inception"
  elif EMBEDDING in weights:
    name = args.model or args.hub or identify(file)
    text = _import_gpt(weights, extra, out, name, args)
  else:
    some = ", ".join(sorted(weights)[:4])
    raise UserError(
      f"{file}: neither a tokenizer ({CODEBOOK}, or encoder.mid of a VAE) nor a"
      f" transformer ({EMBEDDING}) nor Inception ({inception.SIGN}); it holds"
      f" {len(weights)} tensors such as {some}. T5 and CLIP need no import"
    )
  return f"{text}; from {file}" + (f", entry {key!r}" if key else "")


def download(name: str) -> epath.Path:
  """Returns the file of a published checkpoint, from the hub or its local cache."""
  repo, file = PUBLISHED[name].repo, PUBLISHED[name].file_of(name)
  if not file:
    raise UserError(
      f"--hub={name}: the name of its file is not known; look at {repo} on the hub,"
      f" and give it with --file, and --model={name}"
    )
  try:
    return hub.download_file(repo, file)
  except UserError as error:
    raise UserError(
      f"--hub={name}: cannot get {error} -- download it where there is a network, and"
      " give it with --file"
    ) from error


def _import_tokenizer(
  weights: Mapping[str, Stored],
  extra: Mapping[str, Any],
  out: epath.Path,
  args: Options,
) -> str:
  kind = args.kind or tokenizer_kind(weights)
  try:
    fields = _own_fields(extra, TokenizerConfig)
    config, params = tokenizer_from_torch(weights, kind, **fields)
  except UserError as error:
    raise UserError(
      f"{error} (read as {kind}; give --kind to read it as another)"
    ) from error
  identity = bundle.save_tokenizer(out, config, params)
  codes = f"{config.codebook_size} codes of width {config.codebook_dim}"
  if config.continuous:
    codes = f"no codes but latents of {config.codebook_dim} channels"
  return (
    f"tokenizer in {kind} layout, downsampling {config.downsample}, {codes}, identity"
    f" {identity[:12]}"
  )


def _read_tokenizer(args: Options) -> tuple[TokenizerConfig, str]:
  if not args.tokenizer:
    raise UserError(
      "--tokenizer is required for a transformer: the bundle of the tokenizer whose"
      " codes it samples, such as one imported from vq_ds16_c2i.pt"
    )
  config, identity = bundle.read_tokenizer_config(args.tokenizer)
  config.require_codes(f"--tokenizer={args.tokenizer}")
  return config, identity


def _import_gpt(
  weights: Mapping[str, Stored],
  extra: Mapping[str, Any],
  out: epath.Path,
  name: str | None,
  args: Options,
) -> str:
  tokenizer_config, identity = _read_tokenizer(args)
  known = PUBLISHED.get(name)
  fields = _own_fields(extra, GPTConfig)
  fields["grid"] = _grid(args, known, fields, tokenizer_config.downsample)
  config, params = defer_gpt(weights, num_heads=args.num_heads, **fields)
  shape = (config.layers, config.heads, config.dim)
  if known and shape != PRESETS.get(known.model):
    raise UserError(
      f"{name} is a {known.model}, (layers, heads, dim) {PRESETS.get(known.model)}; the"
      f" file holds {shape}: give another --model"
    )
  if config.vocab_size != tokenizer_config.codebook_size:
    raise UserError(
      f"the transformer samples {config.vocab_size} codes, --tokenizer="
      f"{args.tokenizer} has {tokenizer_config.codebook_size}"
    )
  if known:
    best = known.sampling
  else:
    best = SamplingConfig.read(extra.get("sampling", {}), "sampling of the file")
  sampling = dataclasses.replace(best, **sampling_flags.given(args))
  sampling.check_model(config)
  class_names = tuple(extra.get("class_names", ()))
  if not class_names and config.condition == "class" and config.num_classes == 1000:
    class_names = imagenet_names()
  gpt = bundle.Transformer(
    config, params, sampling, identity, class_names, extra.get("text_encoder", "")
  )
  bundle.save_gpt(out, gpt)
  image_size = image_size_of(config.grid, tokenizer_config.downsample)
  return (
    f"transformer, {config.layers} layers of width {config.dim}, {config.condition}"
    f" conditions, {show_pixels(image_size)} images, guidance"
    f" {sampling.guidance_scale:g}, top-k {sampling.top_k}"
  )


def _own_fields(extra: Mapping[str, Any], config: type) -> dict[str, Any]:
  """Returns the config that our export put into the file, or nothing."""
  fields = dict(extra.get("config", {}))
  unknown = fields.keys() - {field.name for field in dataclasses.fields(config)}
  if unknown:
    raise UserError(
      f"the file was exported by another version: its config has {sorted(unknown)}"
    )
  return fields


def _grid(
  args: Options,
  known: Published | None,
  fields: Mapping[str, Any],
  downsample: int,
) -> Sides:
  """Returns rows and columns: of a flag, our own export or the published model."""
  if args.image_size is None and "grid" in fields:
    return fields["grid"]
  image_size = args.image_size or (known.image_size if known else None)
  if image_size is None:
    raise UserError(
      f"the name of {args.file} tells nothing about it: give --image-size,"
      " or --model with one of --list"
    )
  return grid_of(image_size, downsample)
