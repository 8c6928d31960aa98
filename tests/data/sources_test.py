import io
import json
import os
import pathlib

from array_record.python import array_record_module
from etils import epath
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.images import BadImage, ImageDecoder
from llamagen_jax.data.sources import (
  ImageRecord,
  open_source,
  pack_image,
  read_image,
  unpack_image,
)
from tests import tiny


@pytest.fixture
def images(tmp_path):
  return tiny.write_images(tmp_path / "images", count=4)


def test_lists_of_files(images):
  lines = [
    {"image_path": "class0/00.png", "label": 3, "caption": "a blob"},
    {"image_path": "class1/01.png"},
    {"image_path": "class1/gone.png", "label": 1},
  ]
  path = images / "list.jsonl"
  path.write_text("\n\n".join(json.dumps(line) for line in lines))
  source = open_source(f"jsonl:{path}")
  assert [(s.key, s.label) for s in source] == [
    ("class0/00.png", 3), ("class1/01.png", -1), ("class1/gone.png", 1),
  ]  # fmt: skip
  assert ImageDecoder(16)(source[1]).size == (20, 24)
  with pytest.raises(BadImage, match="class1/gone.png: no such file"):
    ImageDecoder(16)(source[2])


@pytest.mark.parametrize(
  "line, words",
  [
    ("{", "Expecting property name"),
    ("[1]", r"JSON is \[1\], expected an object"),
    ("null", "JSON is null"),
    ("[" * 100_000, "JSON too deep"),
    ('{"at": "x"}', "the image's path is None"),
    ('{"image_path": null}', "the image's path is None"),
    ('{"image_path": "ftp://x"}', "found ftp"),
    ('{"image_path": "x", "label": "cat"}', "label is 'cat', expected 0 .. 2147483647"),
    ('{"image_path": "x", "label": 3000000000}', "label is 3000000000"),
    ('{"image_path": "x", "label": -2}', "label is -2"),
    ('{"image_path": "x", "label": true}', "label is True"),
    ('{"image_path": "x", "label": NaN}', "label is nan"),
  ],
)
def test_a_bad_line_is_a_bad_image_and_named(tmp_path, line, words):
  path = tmp_path / "list.jsonl"
  path.write_text('{"image_path": "x"}\n' + line)
  with pytest.raises(BadImage, match="list.jsonl, line at byte 20: .*" + words):
    ImageDecoder(16)(open_source(f"jsonl:{path}")[1])


def test_array_records(tmp_path, images):
  folder = open_source(f"folder:{images}")
  for i in range(2):
    path = str(tmp_path / f"images-{i}.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for sample in (folder[2 * i], folder[2 * i + 1]):
      writer.write(pack_image(sample))
    writer.close()
  source = open_source(f"arrayrecord:{tmp_path}/images-*.array_record")
  assert list(source) == list(folder)


@pytest.mark.parametrize(
  "spec, words",
  [
    ("jsonl:nowhere.jsonl", "no such file"),
    ("arrayrecord:nowhere-*", "no such file"),
    ("tfds:no_such_data_set/train", "tfds build"),
    ("tape:x", "expected folder:PATH, jsonl:"),
  ],
)
def test_what_is_missing_is_named(spec, words):
  with pytest.raises(UserError, match=words) as error:
    open_source(spec)
  assert spec.partition(":")[2] in str(error.value)


def test_a_prepared_data_set_is_read_without_tensorflow(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)

  class Blobs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(20, 24, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["ant", "bee"]),
      })  # fmt: skip
      return self.dataset_info_from_configs(features=features)

    def _split_generators(self, manager):
      return {"validation": self._generate_examples()}

    def _generate_examples(self):
      for i, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        yield i, {"image": file.getvalue(), "label": i % 2}

  Blobs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  source = open_source("tfds:blobs/validation")
  assert source.class_names == ("ant", "bee")
  assert sorted(s.label for s in source) == [0, 0, 1]
  found = {np.asarray(ImageDecoder(16)(sample)).tobytes() for sample in source}
  assert found == {image.tobytes() for image in pixels}
  with pytest.raises(UserError, match="no split 'train'; it has validation"):
    open_source("tfds:blobs")


def test_records_keep_names_in_any_script():
  sample = ImageRecord("größe/猫.png", b"\x00\x01", 7)
  assert unpack_image(pack_image(sample)) == sample


def write(folder, names):
  for name in names:
    path = folder / name if isinstance(name, str) else name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.image_bytes(len(path.name)))
  return open_source(f"folder:{folder}")


def labels(source):
  return [(record.key, record.label) for record in source]


def test_hidden_folders_and_twins_are_no_classes_and_no_images(tmp_path):
  junk = (".ipynb_checkpoints/0.jpg", "__MACOSX/a/0.jpg", "@eaDir/0.jpg", "a/._0.jpg")
  source = write(tmp_path, ["a/0.jpg", "b/0.jpg", *junk])
  assert source.class_names == ("a", "b")
  assert labels(source) == [("a/0.jpg", 0), ("b/0.jpg", 1)]
  flat = write(tmp_path / "a", [])
  assert flat.class_names == () and labels(flat) == [("0.jpg", -1)]


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
  source = write(tmp_path, [f"{i}/{j}.png" for i in range(12) for j in (1, 2, 10)])
  assert source.class_names == tuple(str(i) for i in range(12))
  assert labels(source)[30:33] == [
    ("10/1.png", 10),
    ("10/2.png", 10),
    ("10/10.png", 10),
  ]


def test_images_beside_and_below_the_classes_are_read(tmp_path, caplog):
  source = write(tmp_path, ["0.jpg", "a/b/1.gif", "a/2.jfif", "b/3.avif", "b/n.txt"])
  (tmp_path / "empty").mkdir()
  source = open_source(f"folder:{tmp_path}")
  assert source.class_names == ("a", "b", "empty")
  assert labels(source) == [
    ("0.jpg", -1), ("a/2.jfif", 0), ("a/b/1.gif", 0), ("b/3.avif", 1),
  ]  # fmt: skip
  assert "1 images beside its folders have no class" in caplog.text
  assert "1 classes without images: empty" in caplog.text
  assert "not read as images: 1 .txt" in caplog.text


def test_splits_are_not_taken_for_classes(tmp_path):
  with pytest.raises(UserError, match=r"holds train, val; give one .*/train"):
    write(tmp_path, ["train/a/0.jpg", "val/a/0.jpg"])
  assert write(tmp_path / "train", []).class_names == ("a",)
  assert write(tmp_path / "x", ["test/0.jpg", "val/0.jpg"]).class_names == (
    "test",
    "val",
  )


def test_names_that_are_not_utf8_are_escaped_in_keys(tmp_path):
  name = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/\xff.jpg"))
  source = write(tmp_path, [name])
  assert source.class_names == (r"caf\xe9",)
  record = source[0]
  assert record.key == r"caf\xe9/\xff.jpg"
  assert ImageDecoder()(record).size == (20, 24)
  assert unpack_image(pack_image(record)) == record


def test_what_is_no_file_is_a_bad_image(tmp_path):
  (tmp_path / "folder.jpg").mkdir()
  os.mkfifo(tmp_path / "pipe.jpg")
  (tmp_path / "empty.jpg").touch()
  with (tmp_path / "large.jpg").open("wb") as file:
    file.truncate(2**28 + 1)
  for name, words in {
    "folder.jpg": "not a file", "pipe.jpg": "not a file", "empty.jpg": "an empty file",
    "large.jpg": "268435457 bytes, expected at most 268435456", "/dev/zero": "not a",
    "none.jpg": "no such file", "a\0b.jpg": "null byte", "x" * 5000: "name too long",
  }.items():  # fmt: skip
    image, problem = read_image(epath.Path(tmp_path) / name)
    assert image == b"" and words in problem


def test_a_bad_record_of_an_array_record_is_a_bad_image(tmp_path):
  path = tmp_path / "x.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  good = ImageRecord("größe/猫.png", tiny.image_bytes(0), 7)
  records = b"", b"\0" * 5, b"\0\0\0\0\xff\xff", b"\0\0\0\0\1\0\xff", pack_image(good)
  for record in records:
    writer.write(record)
  writer.close()
  source = open_source(f"arrayrecord:{path}")
  for i in range(4):
    assert f"record {i}" in source[i].key and "no int32 label" in source[i].problem
  assert source[4] == good


def test_a_list_of_hugging_face_is_read(tmp_path):
  (tmp_path / "0.png").write_bytes(tiny.image_bytes(0))
  path = tmp_path / "metadata.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"file_name": "0.png", "label": 1}\r\n\r\n')
  assert labels(open_source(f"jsonl:{path}")) == [("0.png", 1)]


@pytest.mark.extra
def test_folders_lists_and_records_in_a_bucket(bucket, tmp_path):
  for name in ("in/b/1.png", "in/a/10.png", "in/a/2.png", "in/.x/1.png"):
    (bucket / name).write_bytes(tiny.image_bytes(0))
  source = open_source(f"folder:{bucket}/in")
  assert source.class_names == ("a", "b")
  assert labels(source) == [("a/2.png", 0), ("a/10.png", 0), ("b/1.png", 1)]
  assert ImageDecoder()(source[0]).size == (20, 24)
  path = bucket / "in" / "list.jsonl"
  path.write_text(f'{{"image_path": "a/2.png"}}\n{{"image_path": "{bucket}/in/x.png"}}')
  source = open_source(f"jsonl:{path}")
  assert [record.problem for record in source] == ["", "no such file"]
  local = str(tmp_path / "x.array_record")
  writer = array_record_module.ArrayRecordWriter(local, "group_size:1")
  writer.write(pack_image(source[0]))
  writer.close()
  (bucket / "x.array_record").write_bytes(pathlib.Path(local).read_bytes())
  assert open_source(f"arrayrecord:{bucket}/*.array_record")[0] == source[0]
