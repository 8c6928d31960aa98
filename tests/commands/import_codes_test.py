"""Codes of others to code shards: layouts, bad samples, resuming."""

import json

import jax
import numpy as np
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.data.codes import CodeSource, CodeWriter
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training import train_gpt
from llamagen_jax.weights import bundle
from tests import tiny

COUNT, TOKENS = 30, 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "bundle"
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(3)))
  return path, bundle.save_tokenizer(path, tiny.TOKENIZER, params)


@pytest.fixture(scope="module")
def codes():
  return np.random.default_rng(0).integers(0, 16, (COUNT, 2, TOKENS))


def write_lines(path, codes, replaced=None):
  lines = [
    json.dumps({"class_id": i % 4, "tokens": row[0].tolist()}).encode()
    for i, row in enumerate(codes)
  ]
  for index, line in (replaced or {}).items():
    lines[index] = line
  path.write_bytes(b"\n".join(lines) + b"\n")


def command(tokenizer, source, out, *flags):
  return [
    "import-codes", f"--tokenizer={tokenizer[0]}", f"--source={source}",
    f"--out={out}", "--shards=3", *flags,
  ]  # fmt: skip


def test_lines_become_shards_for_training(tmp_path, tokenizer, codes, capsys):
  write_lines(tmp_path / "x.jsonl", codes)
  out = tmp_path / "codes"
  argv = command(tokenizer, f"jsonl:{tmp_path}/x.jsonl", out, "--verify")
  assert cli.run(argv) == 0
  printed = capsys.readouterr().out
  assert "30 images x 1 crops" in printed and "tench 8, goldfish 8" in printed
  source = CodeSource(out)
  assert source.manifest["tokenizer"] == tokenizer[1]
  assert source.manifest["image_size"] == 6 and source.manifest["grid"] == 3
  found = np.stack([source[i].codes for i in range(COUNT)])
  np.testing.assert_array_equal(found, codes[:, :1])
  assert [source[i].label for i in range(COUNT)] == [i % 4 for i in range(COUNT)]
  train_gpt.check_codes(source, tiny.GPT)


def test_npy_folders_become_shards(tmp_path, tokenizer, codes):
  for name in ("small6_codes", "small6_labels"):
    (tmp_path / name).mkdir()
  for i, row in enumerate(codes):
    np.save(tmp_path / "small6_codes" / f"{i}.npy", row[None])
    np.save(tmp_path / "small6_labels" / f"{i}.npy", np.array([i % 4]))
  (tmp_path / "small6_labels" / "11.npy").unlink()
  spec, out = f"npy:{tmp_path}/small6_codes", tmp_path / "codes"
  assert cli.run(command(tokenizer, spec, out, "--max-bad-share=0.1")) == 0
  source = CodeSource(out)
  kept = [i for i in range(COUNT) if i != 11]  # 2 comes before 10
  assert [source[i].key for i in range(len(source))] == [str(i) for i in kept]
  found = np.stack([source[i].codes for i in range(len(source))])
  np.testing.assert_array_equal(found, codes[kept])


BAD = {
  2: (b'{"class_id": 1', "Expecting"),
  5: (b'{"class_id": 1}', "no field tokens"),
  9: (b'{"class_id": 1, "tokens": [1, 2, 3]}', "expected (1, 9)"),
  12: (b'{"class_id": 1000, "tokens": [0,0,0,0,0,0,0,0,0]}', "class 1000"),
  17: (b'{"class_id": true, "tokens": [0,0,0,0,0,0,0,0,0]}', "class True"),
  20: (b'{"class_id": 1, "tokens": [0,0,0,0,0,0,0,0,16]}', "code 16 is out of range"),
  21: (b'{"class_id": 1, "tokens": [0,0,0,0,0,0,0,0,-1]}', "code -1 is out of range"),
  25: (b'{"class_id": 1, "tokens": [0,0,0,0,0,0,0,0,0.5]}', "expected integers"),
  26: (b'{"class_id": 1, "tokens": [[0], [1, 2]]}', "inhomogeneous"),
  28: (b"\xff\xfe", "can't decode"),
}  # fmt: skip


def test_bad_lines_are_named_and_counted(tmp_path, tokenizer, codes, capsys):
  write_lines(tmp_path / "x.jsonl", codes, {i: line for i, (line, _) in BAD.items()})
  spec, out = f"jsonl:{tmp_path}/x.jsonl", tmp_path / "codes"
  assert cli.run(command(tokenizer, spec, out, "--max-bad-share=0.5")) == 0
  assert "20 images x 1 crops" in (printed := capsys.readouterr().out)
  skipped = {
    int(i): why
    for shard in CodeSource(out).manifest["shards"]
    for i, why in shard["skipped"].items()
  }
  assert skipped.keys() == BAD.keys()
  for number, (_, part) in BAD.items():
    assert part in skipped[number] and "\n" not in skipped[number]
    assert skipped[number] in printed
  assert cli.run(command(tokenizer, spec, tmp_path / "strict")) == 2
  assert "bad images so far" in capsys.readouterr().err


def test_a_killed_import_goes_on(tmp_path, tokenizer, codes, monkeypatch):
  write_lines(tmp_path / "x.jsonl", codes)
  spec = f"jsonl:{tmp_path}/x.jsonl"
  assert cli.run(command(tokenizer, spec, tmp_path / "whole")) == 0
  written = []
  write_shard = CodeWriter.write_shard

  def killed(self, index, *rest):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(index)
    write_shard(self, index, *rest)

  monkeypatch.setattr(CodeWriter, "write_shard", killed)
  assert cli.run(command(tokenizer, spec, tmp_path / "codes")) == 75
  assert not (tmp_path / "codes" / "manifest.json").exists()
  written.clear()
  assert cli.run(command(tokenizer, spec, tmp_path / "codes")) == 0
  assert written == [2]
  for path in (tmp_path / "whole").iterdir():
    assert path.read_bytes() == (tmp_path / "codes" / path.name).read_bytes()


@pytest.mark.parametrize(
  "source, message",
  [
    ("folder:x", "expected jsonl:FILE or npy:FOLDER"),
    ("jsonl:none.jsonl", "no such file"),
    ("npy:.", "expected a folder named .._codes"),
  ],
)
def test_other_sources_are_refused(tmp_path, tokenizer, capsys, source, message):
  assert cli.run(command(tokenizer, source, tmp_path / "out")) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


def test_a_file_without_codes_is_refused(tmp_path, tokenizer, capsys):
  (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 3)
  argv = command(tokenizer, f"jsonl:{tmp_path}/x.jsonl", tmp_path / "out")
  assert cli.run(argv) == 2
  assert "no codes can be read: x.jsonl, line at byte 0" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
