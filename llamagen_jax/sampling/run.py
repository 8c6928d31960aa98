"""`llamagen sample`: classes in, pictures out."""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import bundle, pictures
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import unstack_layers
from llamagen_jax.sampling.config import SamplingConfig
from llamagen_jax.sampling.decode import generate


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser("llamagen sample", description=__doc__)
  add = parser.add_argument
  add("--gpt", required=True, help="bundle of the transformer")
  add("--tokenizer", required=True, help="bundle of the tokenizer")
  add("--out", required=True, help="x.png (a grid) or x.npz (arr_0)")
  add("--classes", required=True, help="class indices, such as 207,360")
  add("--count", type=int, default=1, help="pictures a class")
  add("--batch-size", type=int, default=32, help="pictures at a time")
  add("--seed", type=int, default=0)
  for field in dataclasses.fields(SamplingConfig):
    name = "--" + field.name.replace("_", "-")
    if field.type is bool:
      add(name, action=argparse.BooleanOptionalAction)
    else:
      add(name, type=field.type, help="default: the bundle's")
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  if out.suffix not in (".png", ".npz"):
    raise UserError(f"--out={out}: expected a name that ends in .png or .npz")
  try:
    classes = [int(c) for c in args.classes.split(",")]
  except ValueError as error:
    raise UserError(
      f"--classes={args.classes}: expected indices, such as 207,360"
    ) from error

  gpt, tokenizer = bundle.load_gpt(args.gpt), bundle.load_tokenizer(args.tokenizer)
  overrides = {
    field.name: getattr(args, field.name)
    for field in dataclasses.fields(SamplingConfig)
    if getattr(args, field.name) is not None
  }
  labels = np.repeat(classes, args.count)
  started = time.perf_counter()
  images = sample(
    gpt, tokenizer, labels, seed=args.seed, batch_size=args.batch_size, **overrides
  )
  seconds = time.perf_counter() - started
  out.parent.mkdir(parents=True, exist_ok=True)
  if out.suffix == ".npz":
    pictures.save_npz(out, images)
  else:
    columns = args.count if args.count > 1 else min(len(images), 8)
    pictures.save_png(out, pictures.grid(images, columns))
  print(f"{len(images)} pictures in {out}, {seconds:.1f} s with compilation")


def sample(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  classes: Sequence[int],
  *,
  seed: int = 0,
  batch_size: int = 32,
  **sampling,
) -> np.ndarray:
  """Draws one picture a class label.

  Args:
    gpt: from `load_gpt`.
    tokenizer: from `load_tokenizer`; the one whose codes `gpt` learned.
    classes: labels.
    seed: picture i depends on (seed, i) alone, not on what is drawn with it.
    batch_size: pictures at a time.
    **sampling: fields of `SamplingConfig` that differ from the bundle's.

  Returns:
    uint8 [B, H, W, 3].

  Raises:
    UserError: for a label out of range or a tokenizer of other codes.
  """
  labels = np.asarray(classes, np.int32)
  outside = labels[(labels < 0) | (labels >= gpt.config.num_classes)]
  if len(outside):
    raise UserError(
      f"class {outside[0]} is out of range: the model has classes 0 .."
      f" {gpt.config.num_classes - 1}"
    )
  if tokenizer.identity != gpt.tokenizer:
    raise UserError(
      f"the tokenizer {tokenizer.identity[:12]} is not the one that the"
      f" transformer learned the codes of, {gpt.tokenizer[:12]}"
    )
  settings = dataclasses.replace(gpt.sampling, **sampling)
  params = unstack_layers(gpt.params)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(len(labels))
  )
  size = min(batch_size, len(labels))
  images = []
  for start in range(0, len(labels), size):
    # The last batch overlaps the one before, so that its shape is the same.
    start = min(start, len(labels) - size)
    rows = slice(start, start + size)
    codes = generate(gpt.config, params, labels[rows], keys[rows], sampling=settings)
    codes = codes.reshape(size, gpt.config.grid, gpt.config.grid)
    images = images[:start] + list(
      np.asarray(pictures.to_uint8(tokenizer.decode(codes)))
    )
  return np.stack(images)
