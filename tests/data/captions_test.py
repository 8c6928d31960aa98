"""Captions and images from every kind of file, and what is wrong with them."""

import io
import json
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.commands.prepare_captions import prepare
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.captions import Caption, CaptionSource
from llamagen_jax.data.features import FeatureRecord
from llamagen_jax.data.sources import CaptionImageSource, open_source
from llamagen_jax.errors import UserError
from tests import tiny

LLAMAGEN = [sys.executable, "-c", "from llamagen_jax.commands.cli import main; main()"]
IMAGE = tiny.image_bytes(0)


def run(source, out, keys=FieldNames(), **changes):
  settings = {"images": "", "min_side": 16, "shard_count": 3, "workers": 1}
  return prepare(source, out, keys=keys, **(settings | changes))


def samples(folder):
  texts, images = CaptionSource(folder), CaptionImageSource(folder)
  assert len(texts) == len(images)
  found = [(texts[i], images[i]) for i in range(len(texts))]
  assert all(text.key == image.key for text, image in found)
  return [(text, image.image) for text, image in found]


def contents(folder):
  """File names -> bytes, of all that a folder holds."""
  files = {p.name: p.read_bytes() for p in folder.iterdir()}
  assert not [name for name in files if name.startswith(".")]
  return files


def test_records():
  caption = Caption("a/b", 'naïve "x"\n', "x", "t.tar")
  assert Caption.unpack(caption.pack()) == caption
  rows = np.arange(12, dtype=np.float32).reshape(6, 2)
  record = FeatureRecord("kéy", rows[:4], rows[4:])
  found = FeatureRecord.unpack(record.pack(), 2)
  assert found.key == "kéy"
  np.testing.assert_array_equal(found.caption.astype(np.float32), rows[:4])
  np.testing.assert_array_equal(found.short.astype(np.float32), rows[4:])
  empty = FeatureRecord.unpack(FeatureRecord("k", rows[:0], rows[:0]).pack(), 2)
  assert empty.caption.shape == empty.short.shape == (0, 2)


def test_webdataset(tmp_path):
  bad = {
    "000000001.jpg": IMAGE[:100],
    "000000002.jpg": tiny.image_bytes(2, (20, 15)),
    "000000003.txt": b"  ",
    "000000009.json": b"{}",
    "000000010.txt": b"\xff\xff",
    "000000010.jpg": IMAGE,
  }
  tiny.write_tar(tmp_path / "00000.tar", 0, 5, bad)
  tiny.write_tar(tmp_path / "00001.tar", 5, 3)
  whole = (tmp_path / "00001.tar").read_bytes()
  (tmp_path / "00002.tar").write_bytes(whole[:1700])
  keys = FieldNames(short_key="top_caption")
  manifest = run(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", keys)
  found = samples(tmp_path / "out")
  assert [text.key for text, _ in found][:5] == [f"{i:09d}" for i in (0, 4, 5, 6, 7)]
  text, image = found[2]
  assert text == Caption(
    "000000005", tiny.CAPTIONS[5], tiny.CAPTIONS[5][:6], "00001.tar"
  )
  assert image == tiny.image_bytes(5)
  assert manifest["records"] == len(found)
  expected = {
    "broken images": 1, "small images": 1, "empty captions": 1,
    "missing captions": 1, "missing images": 1, "broken texts": 1,
  }  # fmt: skip
  assert manifest["rejected"] == expected | {"broken files": 1}
  listed = (tmp_path / "out" / "rejected-00000-of-00003.txt").read_text().splitlines()
  assert len(listed) == 5
  assert "000000002\tsmall images\t20x15, smaller than min_side=16" in listed
  source = open_source(f"captions:{tmp_path}/out")
  assert source[2].image == image


def test_parquet(tmp_path):
  plain = {"jpg": [IMAGE, None], "caption": ["one", "two"], "key": ["a", "b"]}
  nested = {
    "image": [{"bytes": IMAGE, "path": "x.jpg"}], "text": ["three"], "alt": ["3"],
  }  # fmt: skip
  parquet.write_table(pyarrow.table(plain), tmp_path / "0.parquet")
  parquet.write_table(pyarrow.table(nested), tmp_path / "1.parquet")
  out, keys = tmp_path / "out", FieldNames(short_key="alt")
  manifest = run(f"parquet:{tmp_path}/*.parquet", out, keys)
  texts = [text for text, _ in samples(out)]
  assert texts == [
    Caption("a", "one", "", "0.parquet"),
    Caption("1.parquet:0", "three", "3", "1.parquet"),
  ]
  assert manifest["rejected"] == {"missing images": 1}
  with pytest.raises(UserError, match="no column x of images; its columns are jpg"):
    run(f"parquet:{tmp_path}/0.parquet", tmp_path / "x", FieldNames(image_key="x"))


def test_jsonl(tmp_path):
  (tmp_path / "p").mkdir()
  for i in range(5):
    (tmp_path / "p" / f"{i}.png").write_bytes(tiny.image_bytes(i, kind="PNG"))
  lines = [
    {"image_path": f"p/{i}.png", "text": {"LLaVA": f"long {i}", "alt": f"{i}"}}
    for i in range(6)
  ]
  text = "\n".join([*map(json.dumps, lines), "{", json.dumps({"text": "x"})])
  (tmp_path / "list.jsonl").write_text(text)
  source, keys = f"jsonl:{tmp_path}/list.jsonl", FieldNames("LLaVA", "alt")
  manifest = run(source, tmp_path / "out", keys)
  found = samples(tmp_path / "out")
  assert [(t.key, t.caption, t.short) for t, _ in found] == [
    (f"list.jsonl:{i + 1}", f"long {i}", f"{i}") for i in range(5)
  ]
  assert found[4][1] == tiny.image_bytes(4, kind="PNG")
  assert manifest["rejected"] == {"missing images": 2, "broken lines": 1}
  assert len(manifest["shards"]) == 3
  with pytest.raises(UserError, match="5 missing captions.*among LLaVA, alt; --capt"):
    run(source, tmp_path / "other", FieldNames("nothing"))


def test_coco(tmp_path):
  (tmp_path / "1.jpg").write_bytes(IMAGE)
  fields = {
    "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
    "annotations": [
      {"id": 2, "image_id": 7, "caption": "second"},
      {"id": 1, "image_id": 7, "caption": "first"},
      {"id": 3, "image_id": 8, "caption": "no image"},
    ],
  }
  (tmp_path / "captions.json").write_text(json.dumps(fields))
  manifest = run(
    f"coco:{tmp_path}/captions.json", tmp_path / "out", images=str(tmp_path)
  )
  found = [(text.key, text.caption) for text, _ in samples(tmp_path / "out")]
  assert found == [("7-1", "first"), ("7-2", "second")]
  assert manifest["rejected"] == {"missing images": 1}


def test_folder(tmp_path):
  for name in ("b", "a/c", "a/d"):
    path = tmp_path / "in" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(IMAGE)
    if name != "b":
      path.with_suffix(".txt").write_text(f"about {name}\n")
  manifest = run(f"folder:{tmp_path}/in", tmp_path / "out")
  found = [(text.key, text.caption) for text, _ in samples(tmp_path / "out")]
  assert found == [("a/c", "about a/c"), ("a/d", "about a/d")]
  assert manifest["rejected"] == {"missing captions": 1}


def test_hosts_processes_and_kills_change_nothing(tmp_path):
  for i in range(4):
    tiny.write_tar(tmp_path / f"{i}.tar", 3 * i, 3, {f"00000000{i}.jpg": b"x"})
  source = f"webdataset:{tmp_path}/?.tar"
  run(source, tmp_path / "one")
  expected = contents(tmp_path / "one")
  flags = f"--source={source} --out={tmp_path}/processes --min-side=16 --workers=2"
  subprocess.run([*LLAMAGEN, "prepare-captions", *flags.split()], check=True)
  assert contents(tmp_path / "processes") == expected
  assert run(source, tmp_path / "hosts", hosts=2, host=1) is None
  with pytest.raises(UserError, match="not finished"):
    CaptionSource(tmp_path / "hosts")
  assert run(source, tmp_path / "hosts", hosts=2, host=0)["records"] == 11
  assert contents(tmp_path / "hosts") == expected
  assert run(source, tmp_path / "hosts")["records"] == 11
  with pytest.raises(UserError, match="min_side is 16 there, 17 here"):
    run(source, tmp_path / "hosts", min_side=17)


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
  """The verb is killed while it writes, twice, and the result is the same."""
  for i in range(12):
    tiny.write_tar(tmp_path / f"{i:02d}.tar", 40 * i, 40)
  command = (
    f"prepare-captions --source=webdataset:{tmp_path}/*.tar --out={tmp_path}/killed"
    " --min-side=16 --workers=2"
  ).split()
  for wanted in (1, 4):
    process = subprocess.Popen([*LLAMAGEN, *command], stdout=subprocess.PIPE)
    while len(list((tmp_path / "killed").glob("shard-*.json"))) < wanted:
      time.sleep(0.002)
      assert process.poll() is None, "finished before it was killed"
    process.kill()
    process.communicate(timeout=30)  # which the workers hold open until they end
  assert not (tmp_path / "killed" / "manifest.json").exists()
  assert cli.run(command) == 0
  run(f"webdataset:{tmp_path}/*.tar", tmp_path / "whole")
  assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
  "flags, words",
  [
    ("--source=zip:x", "expected webdataset:"),
    ("--source=webdataset:{f}/*.tar", "no such file"),
    ("--source=folder:{f}", "no images"),
    ("--source=coco:{f}/a.txt", "--image-folder=FOLDER"),
    ("--source=jsonl:{f}/a.txt --host=2", "--host=2: expected 0 .. 0"),
    (
      "--source=jsonl:{f}/a.txt",
      "usable record (1 broken lines); a.txt:1: broken lines: Expecting",
    ),
    ("--source=coco:{f}/a.txt --image-folder={f}", "a.txt: not JSON"),
  ],
)
def test_bad_commands(tmp_path, capsys, flags, words):
  (tmp_path / "a.txt").write_text("x")
  command = f"prepare-captions {flags.format(f=tmp_path)} --out={tmp_path}/out"
  assert cli.run(command.split()) == 2
  assert words in capsys.readouterr().err.strip().splitlines()[-1]


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
