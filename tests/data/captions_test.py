"""Captions and images from every kind of file."""

import json
import subprocess
import sys
import time

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.captions import Caption, CaptionSource
from llamagen_jax.data.features import FeatureRecord
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import UserError
from tests import tiny
from tests.data.caption_shards import IMAGE, run, samples

LLAMAGEN = [sys.executable, "-c", "from llamagen_jax.commands.cli import main; main()"]


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
