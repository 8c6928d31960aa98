import io
import json

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.images import BadImage, decode
from llamagen_jax.data.sources import ImageRecord, open_source, pack_image
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
  assert decode(source[1], 16).size == (20, 24)
  with pytest.raises(BadImage, match="class1/gone.png: no such file"):
    decode(source[2], 16)


@pytest.mark.parametrize("line", ["{", "[1]", '{"path": "x"}',
                                  '{"image_path": "x", "label": "cat"}'])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / "list.jsonl"
  path.write_text('{"image_path": "x"}\n' + line)
  with pytest.raises(UserError, match=r"list.jsonl: line at byte 20: expected"):
    open_source(f"jsonl:{path}")[1]


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
  found = {np.asarray(decode(sample, 16)).tobytes() for sample in source}
  assert found == {image.tobytes() for image in pixels}
  with pytest.raises(UserError, match="no split 'train'; it has validation"):
    open_source("tfds:blobs")


def test_records_keep_names_in_any_script():
  from llamagen_jax.data.sources import unpack_image

  sample = ImageRecord("größe/猫.png", b"\x00\x01", 7)
  assert unpack_image(pack_image(sample)) == sample
