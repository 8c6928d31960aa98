"""Shards in a bucket."""

import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.data.codes import CodeSource, CodeWriter
from llamagen_jax.data.shards import verify
from tests.data.codes_test import PLAN, record
from tests.gcs import names

pytestmark = pytest.mark.extra


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def write(folder, shards):
  writer = CodeWriter(folder, PLAN)
  for shard in shards:
    assert not writer.shards.is_done(shard)
    writer.write_shard(shard, map(record, PLAN.shard_range(shard)), {})
  return writer


def test_codes_are_written_resumed_and_read(bucket, cache):
  folder = bucket / "codes"
  assert write(folder, [0, 2]).finish() is None
  with pytest.raises(UserError, match="no manifest.json .not finished"):
    CodeSource(folder)
  write(folder, [1]).finish()
  assert names(folder) == [
    *(f"codes-0000{i}-of-00003.array_record" for i in range(3)),
    "manifest.json",
    "plan.json",
  ]
  assert not [path for path in cache.rglob("*") if path.is_file()]
  source = CodeSource(str(folder))
  for i in range(10):
    np.testing.assert_array_equal(source[i].codes, record(i).codes)
  assert verify(folder, "codes") == 3
  (folder / "codes-00001-of-00003.array_record").write_bytes(b"short")
  with pytest.raises(UserError, match="codes-00001.*: 5 bytes, expected"):
    CodeSource(folder)


def test_an_object_that_is_not_there_is_named(bucket):
  with pytest.raises(UserError, match=f"codes {bucket}/none: no manifest.json"):
    CodeSource(bucket / "none")
