"""Captions and images that are odd or wrong, in every kind of file."""

import io
import json
import tarfile

import pyarrow
from pyarrow import parquet
import pytest

from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.errors import UserError
from tests.data.caption_shards import IMAGE, run, samples


def rejected(folder):
  """Lines of the lists of what could not be used, without the keys' folders."""
  files = sorted(folder.glob("rejected-*.txt"))
  lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
  return [tuple(line.split("\t")) for line in lines]


def run_lines(folder, lines, keys=FieldNames()):
  """Prepares a list of lines around good ones; returns captions and rejections."""
  (folder / "img.jpg").write_bytes(IMAGE)
  good = json.dumps({"image_path": "img.jpg", "text": "good"})
  lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  (folder / "x.jsonl").write_text("\n".join([good, *lines, good]))
  run(f"jsonl:{folder}/x.jsonl", folder / "out", keys, shard_count=1)
  captions = [text.caption for text, _ in samples(folder / "out")]
  assert captions[0] == captions[-1] == "good"
  return captions[1:-1], [row[1:] for row in rejected(folder / "out")]


@pytest.mark.parametrize(
  "line, reason, detail",
  [
    ({}, "missing captions", "among image_path; --caption-key names one"),
    ({"text": None}, "missing captions", "text is null"),
    ({"text": 7}, "broken texts", "text is 7, expected text"),
    ({"text": []}, "missing captions", "text is []"),
    ({"text": [None, "a"]}, "broken texts", "text is [None, 'a']"),
    ({"text": float("nan")}, "broken texts", "text is nan"),
    ({"text": " \n"}, "empty captions", "text"),
    ({"text": "\ud83d"}, "broken texts", "half a surrogate pair"),
    ({"text": {"T5": "a", "short": "b"}}, "missing captions", "among T5, short"),
    ({"text": {"T5": None}}, "missing captions", "T5 is null"),
    ({"image_path": None, "text": "x"}, "missing images", "path is None"),
    ({"image_path": 7, "text": "x"}, "missing images", "path is 7"),
    (
      {"image_path": "a\0b.jpg", "text": "x"},
      "missing images",
      r"a\x00b.jpg: a null byte",
    ),
    ({"image_path": "\ud83d", "text": "x"}, "missing images", r"\ud83d"),
    ({"image_path": "http://a/b", "text": "x"}, "missing images", "found http"),
    ('{"at": "img.jpg", "text": "x"}', "missing images", "among at, text; --image-key"),
    ("null", "broken lines", "JSON is null, expected an object"),
    ("[" * 100_000, "broken lines", "JSON too deep"),
    ('{"text": "\xff"', "broken lines", "delimiter"),
  ],
)
def test_a_bad_line_is_rejected_and_listed(tmp_path, line, reason, detail):
  if isinstance(line, dict):
    line = {"image_path": "img.jpg", **line}
  captions, [(found, why)] = run_lines(tmp_path, [line])
  assert captions == [] and found == reason and detail in why


@pytest.mark.parametrize(
  "line, keys, found",
  [
    ({"file_name": "img.jpg", "text": "a fox"}, FieldNames(), ["a fox"]),
    ({"path": "img.jpg", "caption": ["one", "two"]}, FieldNames(), ["one", "two"]),
    ({"image_path": "img.jpg", "text": {"LLaVA": "one"}}, FieldNames(), ["one"]),
    ({"image_path": "img.jpg", "text": None, "prompt": "one"}, FieldNames(), ["one"]),
    ({"at": "img.jpg", "alt": "one"}, FieldNames("alt", "", "at"), ["one"]),
    (
      {"image_path": "img.jpg", "text": {"T5": "one", "s": "1"}, "alt": "two"},
      FieldNames("alt"),
      ["two"],
    ),
  ],
)
def test_lines_of_other_kinds_are_read(tmp_path, line, keys, found):
  (tmp_path / "img.jpg").write_bytes(IMAGE)
  text = b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n \r\n"
  (tmp_path / "x.jsonl").write_bytes(text)
  manifest = run(f"jsonl:{tmp_path}/x.jsonl", tmp_path / "out", keys)
  texts = [text for text, _ in samples(tmp_path / "out")]
  assert [text.caption for text in texts] == found and manifest["rejected"] == {}
  many = [f"x.jsonl:1-{i}" for i in range(len(found))]
  assert [text.key for text in texts] == (many if len(found) > 1 else ["x.jsonl:1"])


def write_members(path, members, mode="w"):
  with tarfile.open(path, mode) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


PAIRS = [(f"{i}.{s}", d) for i in range(3) for s, d in (("jpg", IMAGE), ("txt", b"a"))]


@pytest.mark.parametrize(
  "suffix, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("xz", "w:xz")]
)
def test_compressed_tars_are_read_and_cut_ones_are_said(tmp_path, suffix, mode):
  path = tmp_path / f"x.{suffix}"
  write_members(path, PAIRS, mode)
  run(f"webdataset:{path}", tmp_path / "out")
  assert [text.key for text, _ in samples(tmp_path / "out")] == ["0", "1", "2"]
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2] if mode != "w" else whole[:2048])
  write_members(tmp_path / "good.tar", PAIRS[:2])
  manifest = run(f"webdataset:{tmp_path}/{{x.{suffix},good.tar}}", tmp_path / "cut")
  assert manifest["rejected"]["broken files"] == 1


def test_twins_and_other_folders_of_a_mac_are_passed_over(tmp_path):
  twin = b"\x00\x05\x16\x07" + bytes(100)
  twins = [(f"./._{name}", twin) for name, _ in PAIRS] + [("__MACOSX/0.jpg", twin)]
  members = [m for pair in zip(twins, PAIRS, strict=False) for m in pair]
  write_members(tmp_path / "x.tar", [*members, twins[-1]])
  manifest = run(f"webdataset:{tmp_path}/x.tar", tmp_path / "out")
  assert manifest["records"] == 3 and manifest["rejected"] == {}


def test_a_tar_that_is_not_sorted_is_said(tmp_path):
  write_members(tmp_path / "x.tar", sorted(PAIRS, key=lambda m: m[0][-3:]))
  with pytest.raises(UserError, match="3 unsorted files.*sort the tar by name"):
    run(f"webdataset:{tmp_path}/x.tar", tmp_path / "out")


def test_a_damaged_header_is_said(tmp_path):
  write_members(tmp_path / "x.tar", PAIRS)
  data = bytearray((tmp_path / "x.tar").read_bytes())
  second = data.index(b"1.jpg")
  data[second : second + 512] = b"x" * 512
  (tmp_path / "x.tar").write_bytes(data)
  manifest = run(f"webdataset:{tmp_path}/x.tar", tmp_path / "out")
  assert manifest["records"] == 1
  detail = f"damaged at byte {second}"
  assert rejected(tmp_path / "out") == [("x.tar", "broken files", detail)]


def test_bad_texts_in_a_tar_are_listed(tmp_path):
  members = [
    ("0.jpg", IMAGE), ("0.json", b"null"), ("1.jpg", IMAGE), ("1.json", b'["a"]'),
    ("1.txt", b"a fox"), ("2.jpg", IMAGE), ("2.txt", "un caf\xe9".encode("latin-1")),
    ("3.jpg", IMAGE), ("3.txt", "a fox".encode("utf-16")), ("4.heic", IMAGE),
    ("4.txt", b"a fox"), ("caf\udce9.jpg", IMAGE), ("caf\udce9.txt", b"coffee"),
  ]  # fmt: skip
  write_members(tmp_path / "x.tar", members)
  run(f"webdataset:{tmp_path}/x.tar", tmp_path / "out")
  texts = [(text.key, text.caption) for text, _ in samples(tmp_path / "out")]
  assert texts == [("1", "a fox"), (r"caf\xe9", "coffee")]
  assert rejected(tmp_path / "out") == [
    ("0", "broken texts", ".json: JSON is null, expected an object"),
    ("2", "broken texts", ".txt: byte 6 is 0xe9, expected text in UTF-8"),
    ("3", "broken texts", ".txt: byte 0 is 0xff, expected text in UTF-8, found UTF-16"),
    ("4", "missing images", "only .heic, .txt"),
  ]


def test_parquet_with_paths_lists_and_nulls(tmp_path):
  (tmp_path / "img.jpg").write_bytes(IMAGE)
  images = [
    {"bytes": None, "path": "img.jpg"}, {"bytes": IMAGE, "path": None},
    {"bytes": None, "path": None}, None, {"bytes": None, "path": "none.jpg"},
    {"bytes": IMAGE, "path": "x"},
  ]  # fmt: skip
  captions = [["a", "b"], ["c"], ["d"], ["e"], ["f"], None]
  table = pyarrow.table({"image": images, "captions": captions, "a.b": range(6)})
  parquet.write_table(table, tmp_path / "x.parquet")
  manifest = run(f"parquet:{tmp_path}/x.parquet", tmp_path / "out")
  assert [t.caption for t, _ in samples(tmp_path / "out")] == ["a", "b", "c"]
  assert manifest["rejected"] == {"missing captions": 1, "missing images": 3}
  table = pyarrow.table({"at": ["img.jpg", None], "alt": ["a", "b"]})
  parquet.write_table(table, tmp_path / "y.parquet")
  source = f"parquet:{tmp_path}/y.parquet"
  with pytest.raises(UserError, match="columns are at, alt; --image-key names one"):
    run(source, tmp_path / "y")
  with pytest.raises(UserError, match="of captions; .*--caption-key names one"):
    run(source, tmp_path / "y", FieldNames(image_key="at"))
  keys = FieldNames("alt", image_key="at")
  assert run(source, tmp_path / "y", keys)["rejected"] == {"missing images": 1}


def test_one_other_parquet_among_many_is_rejected(tmp_path):
  good = pyarrow.table({"jpg": [IMAGE], "caption": ["a"]})
  parquet.write_table(good, tmp_path / "0.parquet")
  parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "1.parquet")
  (tmp_path / "2.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:100])
  manifest = run(f"parquet:{tmp_path}/*.parquet", tmp_path / "out")
  assert manifest["records"] == 1 and manifest["rejected"] == {"broken files": 2}


def test_nulls_in_coco_are_listed(tmp_path):
  (tmp_path / "img.jpg").write_bytes(IMAGE)
  fields = {
    "images": [{"id": 1, "file_name": "img.jpg"}, {"id": 2, "file_name": None}, None],
    "annotations": [
      {"id": 1, "image_id": 1, "caption": None},
      {"id": 2, "image_id": 1, "caption": "a"},
      {"id": 3, "image_id": 2, "caption": "b"}, {"image_id": []}, 7,
    ],
  }  # fmt: skip
  (tmp_path / "c.json").write_text(json.dumps(fields))
  manifest = run(f"coco:{tmp_path}/c.json", tmp_path / "out", images=str(tmp_path))
  assert manifest["records"] == 1
  assert manifest["rejected"] == {"missing captions": 1, "missing images": 3}
  (tmp_path / "c.json").write_text("[]")
  with pytest.raises(UserError, match="c.json: not COCO's captions"):
    run(f"coco:{tmp_path}/c.json", tmp_path / "x", images=str(tmp_path))


def test_a_folder_with_a_list_names_it(tmp_path):
  (tmp_path / "0.jpg").write_bytes(IMAGE)
  (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "a"}')
  with pytest.raises(UserError, match="expected --source=jsonl:.*metadata.jsonl"):
    run(f"folder:{tmp_path}", tmp_path / "out")


def test_texts_of_a_folder_are_utf8(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  texts = ("\ufeffa fox\r\n".encode(), b"caf\xe9", b"a" * (2**20 + 1), None)
  for i, text in enumerate(texts):
    (folder / f"{i}.jpg").write_bytes(IMAGE)
    if text is not None:
      (folder / f"{i}.txt").write_bytes(text)
  manifest = run(f"folder:{folder}", tmp_path / "out")
  assert [text.caption for text, _ in samples(tmp_path / "out")] == ["a fox"]
  assert manifest["rejected"] == {"broken texts": 2, "missing captions": 1}


@pytest.mark.extra
def test_files_in_a_bucket(bucket, tmp_path):
  write_members(tmp_path / "x.tar", PAIRS)
  (bucket / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes())
  (bucket / "0.jpg").write_bytes(IMAGE)
  (bucket / "0.txt").write_text("a")
  (bucket / "x.jsonl").write_text('{"image_path": "0.jpg", "text": "a"}')
  table = pyarrow.table({"path": ["0.jpg"], "caption": ["a"]})
  parquet.write_table(table, tmp_path / "x.parquet")
  (bucket / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes())
  sources = ("webdataset", "*.tar", 3), ("jsonl", "x.jsonl", 1), ("folder", "", 1), (
    "parquet", "x.parquet", 1,
  )  # fmt: skip
  for kind, name, records in sources:
    manifest = run(f"{kind}:{bucket}/{name}", tmp_path / kind)
    assert manifest["records"] == records and manifest["rejected"] == {}


def test_a_folder_without_records_may_be_tried_again(tmp_path):
  write_members(tmp_path / "x.tar", PAIRS)
  source, out = f"webdataset:{tmp_path}/x.tar", tmp_path / "out"
  with pytest.raises(
    UserError, match="3 small images.; --min-side=N takes smaller.*0: "
  ):
    run(source, out, min_side=64)
  assert list(out.iterdir()) == []
  assert run(source, out, min_side=16)["records"] == 3
