"""Draws parts of an image anew, more of it on any side, or variations of it.

llamagen edit --gpt=c2i_L_256 --tokenizer=vq16 --classes=207 --image=dog.png \\
    --mask=mask.png --count=4 --out=dogs
llamagen edit --gpt=c2i_L_256 --tokenizer=vq16 --classes=207 --image=dog.png \\
    --outpaint=left=64,right=64 --out=wide.png
llamagen edit --gpt=c2i_L_256 --tokenizer=vq16 --classes=207 --image=dog.png \\
    --strength=0.5 --count=8 --out=variations.png
"""

from collections.abc import Sequence
import dataclasses
import io

from etils import epath
import jax
import numpy as np
from PIL import Image

from llamagen_jax.commands import arguments, generation
from llamagen_jax.data.images import BadImage, ImageDecoder, center_crop
from llamagen_jax.errors import UserError
from llamagen_jax.images import grid, save_npz, save_png
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.sampling.edit import Borders, Canvas, EditSettings, edit_canvas
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.sides import Sides, height_width, image_size_of
from llamagen_jax.storage import user_path

FITS = ("refuse", "crop", "resize")
COLUMNS = 8  # of a grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(generation.GenerationOptions, EditSettings):
  """Options of edit."""

  image: str = option("the image to start from", unit="FILE", group="image to edit")
  mask: str | None = option(
    "of the image's size, transparent where to draw; or black and white, white where"
    " to draw; default: where the image is transparent, else everywhere", None,
    unit="FILE", group="image to edit",
  )  # fmt: skip
  outpaint: str = option(
    "pixels to draw on each side: left=64,top=64,right=64,bottom=64", "",
    unit="SIDES", group="image to edit",
  )  # fmt: skip
  fit: str = option(
    "an image of another size than the model's: refuse, crop its centre, or resize it",
    "refuse", choices=FITS, group="image to edit",
  )  # fmt: skip
  out: str = option(
    "x.png (one image or a grid), x.npz (arr_0), or a new folder", unit="PATH",
    group="output",
  )  # fmt: skip
  batch_size: int = option(
    "images at a time on every device, each with all its candidates", 1,
    unit="IMAGES", at_least=1, group="computation",
  )  # fmt: skip


def main(argv: Sequence[str]) -> None:
  run(arguments.parse(Options, "edit", argv, __doc__))


def run(args: Options) -> None:
  """Edits and writes what the options ask for."""
  generation.check(args)
  generation.check_out(args.out)
  borders = parse_borders(args.outpaint)
  if any(borders) and args.keeps_some:
    raise UserError("--outpaint draws all of its borders: leave --strength at 1")
  hosts.initialize_distributed(args)
  image, mask = read_image(args.image), read_mask(args)
  models = generation.load_models(args)
  if args.fit != "refuse":
    size = image_size_of(models.gpt.config.grid, models.tokenizer.config.downsample)
    image, mask = (_fit(part, size, args.fit) for part in (image, mask))
  canvas = _canvas(image, mask, borders)
  conditions, timings = generation.conditions(args, models), Timings()
  images = edit_canvas(
    generation.for_decoding(models.gpt, args.weights), models.tokenizer, canvas,
    conditions, models.sampling, args, seed=args.seed, batch_size=args.batch_size,
    timings=timings,
  )  # fmt: skip
  if jax.process_index() == 0:
    _write(user_path(args.out), images)
    print(f"{len(images)} images of {canvas.size} in {args.out}, {timings}")


def parse_borders(text: str) -> Borders:
  """Reads left=64,top=32 and so on; the sides that are not named stay as they are.

  Raises:
    UserError: another name, or no number of pixels.
  """
  borders = {}
  for part in filter(None, text.split(",")):
    side, _, pixels = (word.strip() for word in part.partition("="))
    if side not in Borders._fields or side in borders or not pixels.isdecimal():
      raise UserError(
        f"--outpaint={text}: expected {'=PIXELS, '.join(Borders._fields)}=PIXELS"
      )
    borders[side] = int(pixels)
  return Borders(**borders)


def read_image(name: str) -> Image.Image:
  """Reads an image file, upright and in RGB; UserError where it cannot be."""
  try:
    return ImageDecoder().decode(_read("--image", name), f"--image={name}")
  except BadImage as error:
    raise UserError(str(error)) from error


def read_mask(args: Options) -> Image.Image | None:
  """Returns where to draw, white in an image of mode L; None = nothing says so."""
  flag, name = ("--mask", args.mask) if args.mask else ("--image", args.image)
  file, key = _read(flag, name), f"{flag}={name}"
  try:
    hidden = ImageDecoder().hidden(file, key, is_mask=bool(args.mask))
  except BadImage as error:
    raise UserError(str(error)) from error
  if hidden is None:
    return None
  return Image.fromarray(np.where(hidden, 255, 0).astype(np.uint8))


def _read(flag: str, name: str) -> io.BytesIO:
  path = user_path(name)
  if not path.is_file():
    raise UserError(f"{flag}={name}: no such file")
  return io.BytesIO(path.read_bytes())


def _fit(image: Image.Image | None, size: Sides, how: str) -> Image.Image | None:
  """Returns the image in the size of the model's, its mode kept."""
  if image is None:
    return None
  if how == "resize":
    height, width = height_width(size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
  return Image.fromarray(center_crop(image.convert("RGB"), size)).convert(image.mode)


def _canvas(image: Image.Image, mask: Image.Image | None, borders: Borders) -> Canvas:
  pixels = np.asarray(image)
  if mask is None:
    hidden = np.full(pixels.shape[:2], not any(borders))
  else:
    if mask.size != image.size:
      raise UserError(
        f"the mask is {'x'.join(map(str, mask.size))} pixels, the image"
        f" {'x'.join(map(str, image.size))}: expected the same"
      )
    hidden = np.asarray(mask) >= 128
  return Canvas(pixels, hidden).extended(borders)


def _write(out: epath.Path, images: np.ndarray) -> None:
  """Writes images as a folder, an npz or a grid, by the name of `out`."""
  out.parent.mkdir(parents=True, exist_ok=True)
  if out.suffix == ".npz":
    save_npz(out, [images], len(images), None)
  elif out.suffix == ".png":
    save_png(out, grid(images, min(len(images), COLUMNS)))
  else:
    out.mkdir(exist_ok=True)
    for row, image in enumerate(images):
      save_png(out / f"{row:05d}.png", Image.fromarray(image))
