import dataclasses
import json

import cloudpickle
import numpy as np
import pytest

from llamagen_jax import GPTConfig, UserError
from llamagen_jax.data.codes import (
  CodeRecord,
  CodeShardSpec,
  CodeSource,
  CodeWriter,
  perplexity,
)
from llamagen_jax.data.shards import verify
from llamagen_jax.training.train_gpt import check_codes

PLAN = CodeShardSpec(
  tokenizer="abc",
  tokenizer_config={"width": 8, "channel_multipliers": (1, 2)},
  image_size=8,
  grid=4,
  codebook_size=300,
  crops=("a", "b"),
  class_names=("cat", "dog", "owl"),
  source="folder:somewhere",
  samples=10,
  shards=3,
)
MODEL = GPTConfig(1, 1, 8, grid=4, vocab_size=300, num_classes=3)


def record(i: int) -> CodeRecord:
  codes = np.random.default_rng(i).integers(0, 300, (2, 16))
  return CodeRecord(f"dir/{i}.png", i % 3, codes)


def shard_name(index: int) -> str:
  return f"codes-{index:05d}-of-{PLAN.shards:05d}.array_record"


def write(folder, plan=PLAN, shards=None):
  writer = CodeWriter(folder, plan)
  for i in range(plan.shards) if shards is None else shards:
    if not writer.shards.is_done(i):
      writer.write_shard(i, map(record, plan.shard_range(i)), {})
  return writer


def test_records_come_back_in_the_order_of_the_source(tmp_path):
  manifest = write(tmp_path).finish()
  source = CodeSource(tmp_path)
  assert len(source) == manifest["records"] == 10
  for i in range(10):
    expected, found = record(i), source[i]
    assert (found.key, found.label) == (expected.key, expected.label)
    np.testing.assert_array_equal(found.codes, expected.codes)
  assert manifest["label_counts"] == {"0": 4, "1": 3, "2": 3}
  used = {c for i in range(10) for c in record(i).codes.ravel()}
  assert manifest["codes_used"] == len(used)
  check_codes(source, MODEL)
  verify(tmp_path, "codes")


def test_a_manifest_says_rows_and_columns(tmp_path):
  for grid, written in ((4, 4), ((2, 8), [2, 8])):
    folder = tmp_path / str(grid)
    manifest = write(folder, dataclasses.replace(PLAN, grid=grid)).finish()
    assert manifest["grid"] == written
    source = CodeSource(folder)
    check_codes(source, dataclasses.replace(MODEL, grid=grid))
    assert (source.grid, source[3].codes.shape) == (grid, (2, 16))
  with pytest.raises(UserError, match="2x8 .* 8x2: --config.model.grid=2,8$"):
    check_codes(source, dataclasses.replace(MODEL, grid=(8, 2)))


@pytest.mark.parametrize("size, bytes_a_code", [(2**16, 2), (2**16 + 1, 4)])
def test_large_codebooks_have_wider_codes(tmp_path, size, bytes_a_code):
  plan = dataclasses.replace(PLAN, codebook_size=size, samples=1, shards=1)
  codes = np.array([[0, size - 1] * 8] * 2)
  writer = CodeWriter(tmp_path, plan)
  writer.write_shard(0, [CodeRecord("x", 1, codes)], {})
  writer.finish()
  np.testing.assert_array_equal(CodeSource(tmp_path)[0].codes, codes)
  assert len(CodeRecord("x", 1, codes).pack(size)) == 7 + 32 * bytes_a_code


def test_unfinished_work_is_resumed_by_shard_and_looks_unfinished(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  write(whole).finish()
  write(cut, shards=[0, 2])
  before = (cut / shard_name(0)).stat().st_mtime_ns
  with pytest.raises(UserError, match="no manifest.json .not finished"):
    CodeSource(cut)

  def dies():
    yield record(0)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    CodeWriter(cut, PLAN).write_shard(1, dies(), {})
  assert not CodeWriter(cut, PLAN).shards.is_done(1)
  write(cut).finish()
  assert (cut / shard_name(0)).stat().st_mtime_ns == before
  for i in range(3):
    name = shard_name(i)
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  manifests = [json.loads((f / "manifest.json").read_text()) for f in (whole, cut)]
  assert manifests[0] == manifests[1]


def test_a_folder_of_other_settings_is_not_written_over(tmp_path):
  write(tmp_path, shards=[0])
  other = dataclasses.replace(PLAN, image_size=16)
  with pytest.raises(UserError, match="image_size is 8 there, 16 here"):
    CodeWriter(tmp_path, other)


def test_damage_is_named(tmp_path):
  write(tmp_path).finish()
  shard = tmp_path / shard_name(1)
  content = shard.read_bytes()
  shard.write_bytes(content[: len(content) // 2])
  with pytest.raises(
    UserError, match=f"{shard.name}: .* bytes, expected {len(content)}"
  ):
    CodeSource(tmp_path)
  shard.unlink()
  with pytest.raises(UserError, match=f"{shard.name}: missing, expected"):
    CodeSource(tmp_path)
  middle = len(content) // 2
  shard.write_bytes(content[:middle] + b"?" + content[middle + 1 :])
  with pytest.raises(UserError, match=f"{shard.name}: sha256"):
    verify(tmp_path, "codes")
  with pytest.raises(UserError, match="no manifest.json .not found"):
    CodeSource(tmp_path / "elsewhere")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"grid": 5}, ["4x4", "5x5", "--config.model.grid=4"]),
    ({"grid": (2, 8)}, ["4x4", "2x8"]),
    ({"vocab_size": 200}, ["300", "200"]),
    ({"num_classes": 2}, ["label 2", "0 .. 1"]),
  ],
)
def test_codes_that_do_not_fit_the_model_are_refused(tmp_path, changes, words):
  write(tmp_path).finish()
  with pytest.raises(UserError) as error:
    check_codes(CodeSource(tmp_path), dataclasses.replace(MODEL, **changes))
  assert all(word in str(error.value) for word in (*words, str(tmp_path)))


def test_a_record_knows_its_sample_in_the_source(tmp_path):
  writer = CodeWriter(tmp_path, PLAN)
  skipped = (0, 3, 4, 9)
  for shard in range(PLAN.shards):
    samples = PLAN.shard_range(shard)
    lost = {i: f"{i}: broken" for i in samples if i in skipped}
    kept = [record(i) for i in samples if i not in skipped]
    writer.write_shard(shard, kept, lost)
  writer.finish()
  source = CodeSource(tmp_path)
  assert [source.sample(i) for i in range(len(source))] == [1, 2, 5, 6, 7, 8]
  assert [source[i].key for i in range(6)] == [
    f"dir/{source.sample(i)}.png" for i in range(6)
  ]


def test_skipped_samples_of_all_starts_count(tmp_path):
  """Every rerun used to let one more bad shard through."""
  for _ in range(3):
    with pytest.raises(UserError, match="bad images so far in folder:somewhere"):
      writer = CodeWriter(tmp_path, PLAN, max_bad_share=0.1)
      for shard in range(PLAN.shards):
        if not writer.shards.is_done(shard):
          first, *rest = PLAN.shard_range(shard)
          writer.write_shard(shard, map(record, rest), {first: "broken"})
  assert len(writer.shards.infos()) == 2  # one image in ten is no more than a tenth
  writer = CodeWriter(tmp_path, PLAN, max_bad_share=0.3)
  writer.write_shard(2, map(record, PLAN.shard_range(2)), {})
  assert writer.finish()["records"] == 8
  with pytest.raises(UserError, match="more than --max-bad-share=0.1"):
    CodeWriter(tmp_path, PLAN, max_bad_share=0.1)


def test_perplexity():
  assert perplexity(np.array([5, 5, 5, 0])) == pytest.approx(3)
  assert perplexity(np.array([7, 0])) == pytest.approx(1)


def test_a_source_can_be_sent_to_workers(tmp_path):
  write(tmp_path).finish()
  source = cloudpickle.loads(cloudpickle.dumps(CodeSource(tmp_path)))
  np.testing.assert_array_equal(source[3].codes, record(3).codes)
