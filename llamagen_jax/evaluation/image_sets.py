"""Images to evaluate, from an npz or a folder, read a batch at a time."""

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
from typing import Any
import zipfile
import zlib

from etils import epath
import numpy as np

from llamagen_jax.data.file_names import IMAGE_SUFFIXES, list_images
from llamagen_jax.data.images import BadImage, ImageDecoder, center_crop
from llamagen_jax.errors import UserError, first_line
from llamagen_jax.sides import as_sides
from llamagen_jax.storage import read_json, user_path

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
CHUNK = 16 * 2**20
READERS = 8  # threads that decode the files of a folder
# Of zipfile and numpy for a broken or foreign file. RuntimeError: encrypted.
NPZ_ERRORS = (
  zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError,
  RuntimeError, MemoryError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """A set of images on disk."""

  path: epath.Path
  count: int
  size: tuple[int, int] | None  # height and width, None where there are none
  lossy: bool  # holds JPEG files
  labels: np.ndarray | None
  statistics: dict[str, np.ndarray]  # mean and covariance that an npz came with
  files: tuple[str, ...] = ()  # of a folder, relative to it, in natural order
  crop: int | None = None  # files are centre-cropped to this side as they are read
  decoder: ImageDecoder = ImageDecoder()

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of the npz, or of the names and bytes in the folder and how it is read."""
    digest = hashlib.sha256()
    if self.files:
      digest.update(f"{self.decoder} crop {self.crop}\0".encode())
    for name in self.files or [""]:
      digest.update(os.fsencode(name) + b"\0" if name else b"")
      with (self.path / name if name else self.path).open("rb") as stream:
        while chunk := stream.read(CHUNK):
          digest.update(chunk)
    return digest.hexdigest()

  @property
  def settings(self) -> dict[str, Any] | None:
    """The settings that `llamagen sample` wrote next to an npz, if it did."""
    path = self.path.with_suffix(".json")
    if self.files or not path.exists():
      return None
    settings = read_json(path)
    if not _has_settings(settings):
      raise UserError(
        f"{path}: not the settings that `llamagen sample` writes; move the file away"
      )
    return settings

  def batches(self, size: int) -> Iterator[np.ndarray]:
    """Reads uint8 [B, H, W, 3], all of `size` rows but the last."""
    starts = range(0, self.count, size)
    return self.read(range(i, min(i + size, self.count)) for i in starts)

  def read(self, parts: Iterable[range]) -> Iterator[np.ndarray]:
    """Reads images uint8 [B, H, W, 3] of ascending ranges of rows, and no others."""
    if self.files:
      yield from self._read_files(parts)
      return
    with _member(self.path, "arr_0") as (stream, shape, dtype):
      first, row = stream.tell(), int(np.prod(shape[1:]))
      for part in parts:
        stream.seek(first + part.start * row)
        data = _read_exactly(stream, len(part) * row, self.path)
        yield np.frombuffer(data, dtype).reshape(len(part), *shape[1:])

  def _read_files(self, parts: Iterable[range]) -> Iterator[np.ndarray]:
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
      for part in parts:
        images = list(pool.map(self._read_image, self.files[part.start : part.stop]))
        yield np.array(images, np.uint8).reshape(-1, *self.size, 3)

  def _read_image(self, name: str) -> np.ndarray:
    path = self.path / name
    with _readable(path), path.open("rb") as file:
      image = self.decoder.decode(file, name)
    if self.crop is not None:
      return center_crop(image, self.crop)
    if (image.height, image.width) != self.size:
      raise UserError(
        f"{path}: {image.width}x{image.height}, its header says"
        f" {self.size[1]}x{self.size[0]}"
      )
    return np.asarray(image)


def _has_settings(found: Any) -> bool:
  """Returns whether a JSON value may be what `llamagen sample` writes."""
  if not isinstance(found, dict):
    return False
  try:
    for name in {"image_size", "sampled_size"} & found.keys():
      as_sides(found[name], name)
  except UserError:
    return False
  configs = {"transformer_config", "tokenizer_config", "sampling"} & found.keys()
  return all(isinstance(found[name], dict) for name in configs)


def open_image_set(
  flag: str,
  path: str | os.PathLike,
  crop: int | None = None,
  *,
  as_stored: bool = False,
) -> ImageSet:
  """Looks at an npz or a folder of images without reading the images.

  Args:
    flag: that named it.
    path: npz or folder; the images of a folder may lie in folders of its own.
    crop: side of the centre crops to take of a folder's files, of any size.
    as_stored: leave turned photographs as stored, as the published scores do.
  """
  path = user_path(path)
  if path.is_dir():
    return _open_folder(flag, path, crop, ImageDecoder(ignore_exif=as_stored))
  if not path.exists():
    raise UserError(f"{flag}={path}: no such file or folder")
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      names = {name.removesuffix(".npy") for name in archive.namelist()}
  except NPZ_ERRORS as error:
    raise UserError(f"{flag}={path}: neither an npz nor a folder") from error
  try:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
      arrays = {n: file[n] for n in (*STATISTICS, "arr_1") if n in names}
    if foreign := [n for n, a in arrays.items() if not isinstance(a, np.ndarray)]:
      raise ValueError(f"{foreign[0]} is no array")
  except NPZ_ERRORS as error:
    raise UserError(
      f"{flag}={path}: labels or statistics cannot be read ({first_line(error)})"
    ) from error
  labels = arrays.pop("arr_1", None)
  for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
    _check_statistics(f"{flag}={path}", arrays, mean, covariance)
  if "arr_0" not in names:
    if "mu" not in names:
      raise UserError(f"{flag}={path}: has {sorted(names)[:8]}, expected arr_0 or mu")
    return ImageSet(path, 0, None, False, labels, arrays)
  with _member(path, "arr_0") as (_, shape, dtype):
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
      raise UserError(
        f"{flag}={path}: arr_0 is {dtype} {shape}, expected uint8 [N, H, W, 3]"
      )
  if labels is not None and (
    labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)
  ):
    raise UserError(
      f"{flag}={path}: arr_1 is {labels.dtype} {labels.shape}, expected integer labels"
      f" [{shape[0]}]"
    )
  return ImageSet(path, shape[0], shape[1:3], False, labels, arrays)


def _check_statistics(
  name: str, statistics: dict[str, np.ndarray], mean: str, covariance: str
) -> None:
  found = {n: statistics[n] for n in (mean, covariance) if n in statistics}
  shapes = {n: value.shape for n, value in found.items()}
  square = {mean: shapes.get(covariance, ())[:1], covariance: 2 * shapes.get(mean, ())}
  floats = all(np.issubdtype(value.dtype, np.floating) for value in found.values())
  if found and (shapes != square or not floats):
    raise UserError(
      f"{name}: {shapes}, expected floats {mean} [D], {covariance} [D, D]"
    )


def _open_folder(
  flag: str, path: epath.Path, crop: int | None, decoder: ImageDecoder
) -> ImageSet:
  files = list_images(path)
  if not files:
    raise UserError(f"{flag}={path}: no images ({', '.join(IMAGE_SUFFIXES)})")
  lossy = any(file.lower().endswith(LOSSY) for file in files)
  size = (crop, crop) if crop else _common_size(flag, path, files, decoder)
  return ImageSet(path, len(files), size, lossy, None, {}, tuple(files), crop, decoder)


@contextlib.contextmanager
def _member(path: epath.Path, name: str):
  """Opens an array of an npz; gives its stream, shape and dtype."""
  try:
    with (
      path.open("rb") as file,
      zipfile.ZipFile(file) as archive,
      archive.open(f"{name}.npy") as stream,
    ):
      version = np.lib.format.read_magic(stream)
      read = np.lib.format.read_array_header_1_0
      if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
      shape, fortran, dtype = read(stream)
      if fortran:
        raise UserError(f"{path}: {name} is in Fortran order")
      yield stream, shape, dtype
  except NPZ_ERRORS as error:
    raise UserError(f"{path}: {name} cannot be read ({first_line(error)})") from error


def _read_exactly(stream, size: int, path) -> bytes:
  data = stream.read(size)
  if len(data) != size:
    raise UserError(f"{path}: ends early; it is not whole")
  return data


def _common_size(
  flag: str, folder: epath.Path, files: list[str], decoder: ImageDecoder
) -> tuple[int, int]:
  """Returns height and width of all images, from their headers."""
  sizes: dict[tuple[int, int], epath.Path] = {}
  for name in files:
    path = folder / name
    with _readable(path), path.open("rb") as file:
      width, height = decoder.size(file, name)
    sizes.setdefault((height, width), path)
  if len(sizes) > 1:
    (one, first), (other, second), *_ = sizes.items()
    raise UserError(
      f"{flag}: images of several sizes, {first} is {one} and {second} {other}; crop"
      " them to one"
    )
  return next(iter(sizes))


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
  """Turns the errors of reading an image into one line."""
  try:
    yield
  except (OSError, BadImage) as error:
    reason = str(error).partition(": ")[2] or first_line(error)
    raise UserError(f"{path}: no image that can be read ({reason})") from error
