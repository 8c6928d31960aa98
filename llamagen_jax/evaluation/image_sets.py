"""Images to evaluate, from an npz or a folder, read a batch at a time."""

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any
import zipfile

from etils import epath
import numpy as np
from PIL import Image

from llamagen_jax.data.images import center_crop
from llamagen_jax.errors import UserError

LOSSLESS = (".png", ".webp", ".bmp")
LOSSY = (".jpg", ".jpeg")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
CHUNK = 16 * 2**20
READERS = 8  # threads that decode the files of a folder


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of images on disk."""

  path: epath.Path
  count: int
  size: tuple[int, int] | None  # height and width, None where there are none
  lossy: bool  # holds JPEG files
  labels: np.ndarray | None
  statistics: dict[str, np.ndarray]  # mean and covariance that an npz came with
  crop: int | None = None  # files are centre-cropped to this side as they are read

  @functools.cached_property
  def sha256(self) -> str:
    """Of the npz, or of the names and bytes in the folder."""
    digest = hashlib.sha256(b"" if self.crop is None else b"crop %d\0" % self.crop)
    for file in _files(self.path) if self.path.is_dir() else [self.path]:
      if self.path.is_dir():
        digest.update(file.name.encode() + b"\0")
      with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
          digest.update(chunk)
    return digest.hexdigest()

  @property
  def settings(self) -> dict[str, Any] | None:
    """What `llamagen sample` wrote next to an npz, if it did."""
    side = self.path.with_suffix(".json")
    if self.path.is_dir() or not side.exists():
      return None
    try:
      return json.loads(side.read_text())
    except json.JSONDecodeError as error:
      raise UserError(f"{side}: no JSON: {error}") from error

  def batches(self, size: int) -> Iterator[np.ndarray]:
    """uint8 [B, H, W, 3], all of `size` rows but the last."""
    starts = range(0, self.count, size)
    return self.read(range(i, min(i + size, self.count)) for i in starts)

  def read(self, parts: Iterable[range]) -> Iterator[np.ndarray]:
    """Images uint8 [B, H, W, 3] of ascending ranges of rows; nothing else is read."""
    if self.path.is_dir():
      yield from self._read_files(parts)
      return
    with _member(self.path, "arr_0") as (stream, shape, dtype):
      first, row = stream.tell(), int(np.prod(shape[1:]))
      for part in parts:
        stream.seek(first + part.start * row)
        data = _read_exactly(stream, len(part) * row, self.path)
        yield np.frombuffer(data, dtype).reshape(len(part), *shape[1:])

  def _read_files(self, parts: Iterable[range]) -> Iterator[np.ndarray]:
    files = _files(self.path)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
      for part in parts:
        images = list(pool.map(self._read_image, files[part.start : part.stop]))
        yield np.array(images, np.uint8).reshape(-1, *self.size, 3)

  def _read_image(self, file: epath.Path) -> np.ndarray:
    with _opened(file) as image:
      image = image.convert("RGB")
      return np.asarray(image if self.crop is None else center_crop(image, self.crop))


def open_image_set(
  flag: str, path: str | os.PathLike, crop: int | None = None
) -> Source:
  """Looks at an npz or a folder of images without reading the images.

  Args:
    flag: that named it.
    path: npz or folder.
    crop: side of the centre crops to take of a folder's files, of any size.
  """
  path = epath.Path(path)
  if path.is_dir():
    files = _files(path)
    if not files:
      raise UserError(f"{flag}={path}: no images ({', '.join(LOSSLESS + LOSSY)})")
    lossy = any(file.suffix.lower() in LOSSY for file in files)
    size = (crop, crop) if crop else _common_size(flag, files)
    return Source(path, len(files), size, lossy, None, {}, crop)
  if not path.exists():
    raise UserError(f"{flag}={path}: no such file or folder")
  try:
    with zipfile.ZipFile(path.open("rb")) as archive:
      names = {name.removesuffix(".npy") for name in archive.namelist()}
  except zipfile.BadZipFile as error:
    raise UserError(f"{flag}={path}: neither an npz nor a folder") from error
  with np.load(path.open("rb"), allow_pickle=False) as file:
    statistics = {name: file[name] for name in STATISTICS if name in names}
    labels = file["arr_1"] if "arr_1" in names else None
  if "arr_0" not in names:
    if "mu" not in names:
      raise UserError(f"{flag}={path}: has {sorted(names)}, expected arr_0 or mu")
    return Source(path, 0, None, False, labels, statistics)
  with _member(path, "arr_0") as (_, shape, dtype):
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
      raise UserError(
        f"{flag}={path}: arr_0 is {dtype} {shape}, expected uint8 [N, H, W, 3]"
      )
  return Source(path, shape[0], shape[1:3], False, labels, statistics)


@contextlib.contextmanager
def _member(path: epath.Path, name: str):
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


def _read_exactly(stream, size: int, path) -> bytes:
  data = stream.read(size)
  if len(data) != size:
    raise UserError(f"{path}: ends early; it is not whole")
  return data


def _files(folder: epath.Path) -> list[epath.Path]:
  found = (f for f in folder.iterdir() if f.suffix.lower() in LOSSLESS + LOSSY)
  return sorted(found, key=lambda file: file.name)


def _common_size(flag: str, files: list[epath.Path]) -> tuple[int, int]:
  """Height and width of all images, from their headers."""
  sizes: dict[tuple[int, int], epath.Path] = {}
  for file in files:
    with _opened(file) as image:
      sizes.setdefault((image.height, image.width), file)
  if len(sizes) > 1:
    (one, first), (other, second), *_ = sizes.items()
    raise UserError(
      f"{flag}: images of several sizes, {first} is {one} and {second} {other}; crop"
      " them to one"
    )
  return next(iter(sizes))


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[Image.Image]:
  try:
    with file.open("rb") as stream, Image.open(stream) as image:
      yield image
  except OSError as error:
    raise UserError(f"{file}: no image that can be read: {error}") from error
