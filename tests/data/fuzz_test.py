"""Every reader of users' files, on files with random damage: errors are one line.

A reader either reads a damaged file, counts records that it cannot use, or raises a
UserError of one line. Seeds are fixed, so a failure comes again.
"""

import collections
from collections.abc import Callable
import io
import itertools
import json
import pathlib
import random
import shutil
import tarfile

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest

from llamagen_jax.commands.prepare_captions import prepare
from llamagen_jax.data.caption_files import open_files
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.data.features import FeatureRecord, FeatureSource
from llamagen_jax.data.images import BadImage, ImageDecoder
from llamagen_jax.data.shards import ShardWriter
from llamagen_jax.data.sources import ImageRecord, open_source, pack_image
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.sampling.prompts import read_prompts
from tests import tiny

JPEG = tiny.image_bytes(0)
NUMBERS = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0")
LONG = pytest.param(40, marks=[pytest.mark.slow, pytest.mark.nightly])


def damaged(rng: random.Random, data: bytes) -> bytes:
  """Changes, inserts, deletes, copies and cuts bytes at random places."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 16))):
    at = rng.randrange(len(data) + 1)
    match rng.randrange(6):
      case 0:
        data[at : at + 1] = rng.randbytes(1)
      case 1:
        data[at : at + 1] = bytes(
          byte ^ 1 << rng.randrange(8) for byte in data[at:][:1]
        )
      case 2:
        del data[at : at + rng.randrange(1, 64)]
      case 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 16))
      case 4:
        data[at : at + 4] = rng.choice(NUMBERS)
      case 5:
        other = rng.randrange(len(data) + 1)
        data[at : at + 16] = data[other : other + 16]
  if rng.random() < 0.1:
    del data[rng.randrange(len(data) + 1) :]
  return bytes(data)


def encoded(channels: int, kind: str, **options) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (20, 24, channels), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


def images() -> list[bytes]:
  exif = Image.Exif()
  exif[0x112] = 6
  return [
    encoded(3, "JPEG", exif=exif), encoded(4, "PNG", exif=exif), encoded(3, "GIF"),
    encoded(4, "WEBP"), encoded(4, "TIFF"), encoded(3, "TIFF", compression="tiff_lzw"),
    encoded(4, "AVIF"), encoded(3, "JPEG2000"), encoded(3, "BMP"), encoded(3, "PPM"),
  ]  # fmt: skip


def tar(mode: str) -> bytes:
  file = io.BytesIO()
  members = {"jpg": JPEG, "txt": b"a fox", "json": b'{"caption": "a"}'}
  with tarfile.open(fileobj=file, mode=mode) as opened:
    for i, (suffix, data) in itertools.product(range(3), members.items()):
      info = tarfile.TarInfo(f"{i}.{suffix}")
      info.size = len(data)
      opened.addfile(info, io.BytesIO(data))
  return file.getvalue()


def table() -> bytes:
  images = [{"bytes": JPEG, "path": "x"}, {"bytes": None, "path": "img.jpg"}] * 3
  columns = {"image": images, "caption": ["a", "b"] * 3, "key": ["a", "b"] * 3}
  file = io.BytesIO()
  parquet.write_table(pyarrow.table(columns), file)
  return file.getvalue()


LINES = (
  {"image_path": "img.jpg", "text": {"a": "b"}}, {"image_path": "img.jpg", "label": 1},
  {"file_name": "img.jpg", "text": ["a", "b"], "label": 3}, {"caption": None},
)  # fmt: skip
COCO = {
  "images": [{"id": 1, "file_name": "img.jpg"}],
  "annotations": [{"id": i, "image_id": 1, "caption": "a"} for i in range(3)],
}


def captioned(spec: str, folder: pathlib.Path) -> int:
  """Reads all records of a caption source; returns how many cannot be used."""
  files = open_files(spec, FieldNames(), str(folder), 2)
  records = [r for shard in range(files.shards) for r in files.read(shard)]
  for record in records:
    assert "\n" not in record.problem + record.key
    (record.key + record.caption + record.short + record.problem).encode()
  return sum(bool(record.problem) for record in records)


def images_of(spec: str) -> int:
  source = open_source(spec)
  records = [source[i] for i in range(len(source))]
  return sum(bool(pack_image(record) and record.problem) for record in records)


def npz() -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
  file = io.BytesIO()
  np.savez_compressed(file, arr_0=pixels, arr_1=np.arange(3), mu=np.ones(2),
                      sigma=np.eye(2))  # fmt: skip
  return file.getvalue()


def evaluated(path: pathlib.Path) -> int:
  for _ in open_image_set("--samples", path).batches(2):
    pass
  return 0


FILES = {
  "tar": ([tar("w"), tar("w:gz"), tar("w:xz"), tar("w:bz2")],
          lambda p: captioned(f"webdataset:{p}", p.parent)),
  "parquet": ([table()], lambda p: captioned(f"parquet:{p}", p.parent)),
  "jsonl": (["\n".join(map(json.dumps, LINES)).encode()],
            lambda p: captioned(f"jsonl:{p}", p.parent) + images_of(f"jsonl:{p}")),
  "json": ([json.dumps(COCO).encode()], lambda p: captioned(f"coco:{p}", p.parent)),
  "csv": ([b'prompt,n\n"a ""cat"", b",1\nc,2\n'], lambda p: not read_prompts(str(p))),
  "tsv": ([b'prompt\tn\n"a cat"\t1\nb\t2\n'], lambda p: not read_prompts(str(p))),
  "txt": (["a\ncafé\n".encode()], lambda p: not read_prompts(str(p))),
  "npz": ([npz()], evaluated),
}  # fmt: skip


def count(counts: collections.Counter, read: Callable[[], int], name: str) -> None:
  """Counts how a reader ends; its error is one line that names the file."""
  try:
    result, message = "with bad records" if read() else "read", name
  except (BadImage, UserError) as error:
    result, message = "refused", str(error)
  counts[result] += 1
  assert "\n" not in message and name in message


def report(kind: str, counts: collections.Counter) -> None:
  print(f"{kind}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
  assert len(counts) > 1, "the damage is too small or too large to say anything"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", [1, LONG])
def test_damaged_images(times):
  rng, corpus, counts = random.Random(times), images(), collections.Counter()
  decoder = ImageDecoder(4)
  for _ in range(2000 * times):
    data = damaged(rng, rng.choice(corpus))
    record, file = ImageRecord("x", data), io.BytesIO(data)
    count(counts, lambda r=record: not decoder(r), "x")
    count(counts, lambda f=file: not decoder.size(f, "x"), "x")
  report("images", counts)


@pytest.mark.parametrize("times", [1, LONG])
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(tmp_path, kind, times):
  (tmp_path / "img.jpg").write_bytes(JPEG)
  (corpus, read), path = FILES[kind], tmp_path / f"x.{kind}"
  rng, counts = random.Random(times), collections.Counter()
  for _ in range(150 * times):
    path.write_bytes(damaged(rng, rng.choice(corpus)))
    count(counts, lambda: read(path), str(path))
  report(kind, counts)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  """Folders of every kind of shards."""
  folder = tmp_path_factory.mktemp("shards")
  tiny.write_codes(folder / "codes")
  (folder / "in").mkdir()
  for i in range(4):
    (folder / "in" / f"{i}.jpg").write_bytes(JPEG)
    (folder / "in" / f"{i}.txt").write_text("a fox")
  prepare(
    f"folder:{folder}/in", folder / "captions", keys=FieldNames(), images="",
    min_side=4, shard_count=2, workers=1,
  )  # fmt: skip
  writer = ShardWriter(folder / "features", {"kind": "features", "dim": 2}, 1)
  with writer.records("features", 0) as records:
    for i in range(3):
      record = FeatureRecord(f"{i}", np.ones((i + 1, 2)), np.ones((1, 2)))
      records.write(record.pack())
  names = {"features": writer.file_name("features", 0)}
  writer.commit(0, names, {"records": 3})
  writer.finish(lambda _: {"records": 3})
  path = str(folder / "images.array_record")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  for i in range(4):
    writer.write(pack_image(ImageRecord(f"{i}", JPEG, i)))
  writer.close()
  return folder


def all_read(source) -> int:
  """Reads all records of a folder; returns how many cannot be used."""
  return sum(bool(getattr(source[i], "problem", "")) for i in range(len(source)))


def caption_images(folder):
  assert CaptionSource(folder).identity
  return open_source(f"captions:{folder}")


@pytest.mark.parametrize("times", [1, LONG])
@pytest.mark.parametrize(
  "kind, open_folder",
  [("codes", CodeSource), ("captions", CaptionSource), ("features", FeatureSource),
   ("captions", caption_images)],
)  # fmt: skip
@pytest.mark.parametrize("file", ["manifest.json", "*.array_record"])
def test_damaged_shards(shards, tmp_path, kind, open_folder, file, times):
  rng, counts, folder = random.Random(times), collections.Counter(), tmp_path / "x"
  shutil.copytree(shards / kind, folder)
  for _ in range(50 * times):
    path = rng.choice(sorted(folder.glob(file)))
    old = path.read_bytes()
    new = damaged(rng, old)
    if path.suffix != ".json":  # of the size that the manifest says
      new = (new + old)[: len(old)]
    path.write_bytes(new)
    count(counts, lambda: all_read(open_folder(folder)), str(folder))
    path.write_bytes(old)
  report(f"{kind} {file}", counts)


@pytest.mark.parametrize("times", [1, LONG])
def test_damaged_array_records(shards, tmp_path, times):
  rng, counts = random.Random(times), collections.Counter()
  whole = (shards / "images.array_record").read_bytes()
  path = tmp_path / "x.array_record"
  for _ in range(100 * times):
    path.write_bytes(damaged(rng, whole))
    count(counts, lambda: images_of(f"arrayrecord:{path}"), str(path))
  report("arrayrecord", counts)
