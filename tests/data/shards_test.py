"""Folders of shards: who writes the manifest, and what is left behind."""

import pytest

from llamagen_jax import UserError
from llamagen_jax.data import shards
from llamagen_jax.data.shards import MANIFEST, ShardWriter

PLAN = {"kind": "letters"}


def total(infos):
  return {"records": sum(info["records"] for info in infos)}


def write(folder: ShardWriter, index: int):
  name = folder.file_name("letters", index)
  folder.part(name).write_bytes(b"abc"[: index + 1])
  folder.commit(index, {"letters": name}, {"records": index + 1})


def test_the_host_that_finishes_last_writes_the_manifest(tmp_path):
  first, second = (ShardWriter(tmp_path, PLAN, 2) for _ in range(2))
  write(first, 0)
  assert first.finish(total) is None
  write(second, 1)
  manifest = second.finish(total)
  assert manifest["records"] == 3
  assert first.finish(total) == manifest
  assert len(list(tmp_path.iterdir())) == 4  # plan, manifest and two shards


def test_two_hosts_finish_at_once(tmp_path, monkeypatch):
  first, second = (ShardWriter(tmp_path, PLAN, 1) for _ in range(2))
  write(first, 0)
  names = shards.sizes(tmp_path)
  first.finish(total)

  def stale(folder):  # the listing that the second host saw before the first finished
    monkeypatch.undo()
    return names

  monkeypatch.setattr(shards, "sizes", stale)
  assert second.finish(total)["records"] == 1


def test_opening_a_folder_opens_no_shard(tmp_path):
  folder = ShardWriter(tmp_path, PLAN, 2)
  for index in range(2):
    with folder.records("letters", index) as writer:
      writer.write(b"ab"[index : index + 1])
    name = folder.file_name("letters", index)
    folder.commit(index, {"letters": name}, {"records": 1})
  manifest = folder.finish(total)
  records = shards.Records(tmp_path, manifest, "letters", bytes)
  (tmp_path / folder.file_name("letters", 0)).write_bytes(b"no ArrayRecord")
  assert len(records) == 2 and records[1] == b"b"


def test_any_shard_changes_the_identity(tmp_path):
  identities = set()
  for changed in (None, *range(6)):
    folder = ShardWriter(tmp_path / str(changed), PLAN, 6)
    for index in range(6):
      name = folder.file_name("letters", index)
      folder.part(name).write_bytes(b"x" if index == changed else b"a")
      folder.commit(index, {"letters": name}, {"records": 1})
    identities.add(shards.identity(folder.finish(total), "letters"))
  assert len(identities) == 7


def test_a_kill_after_the_manifest_leaves_nothing(tmp_path):
  folder = ShardWriter(tmp_path, PLAN, 1)
  write(folder, 0)
  (info,) = tmp_path.glob("shard-*.json")
  vouched = info.read_text()
  folder.finish(total)
  info.write_text(vouched)
  assert ShardWriter(tmp_path, PLAN, 1).finish(total)["records"] == 1
  assert not info.exists() and (tmp_path / MANIFEST).exists()


def test_a_mistake_is_corrected_in_the_same_folder(tmp_path):
  """Until the first record: begun with a wrong setting, or nothing found."""
  ShardWriter(tmp_path, PLAN | {"side": 256}, 2)
  folder = ShardWriter(tmp_path, PLAN | {"side": 64}, 2)
  for index in range(2):
    name = folder.file_name("letters", index)
    folder.part(name).write_bytes(b"")
    folder.commit(index, {"letters": name}, {"records": 0})
  (tmp_path / "rejected-00000-of-00002.txt").write_text("all of them")
  again = ShardWriter(tmp_path, PLAN | {"side": 64}, 2)  # the data was corrected
  assert not again.is_done(0)
  assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
  write(again, 0)
  with pytest.raises(UserError, match="side is 64 there, 32 here"):
    ShardWriter(tmp_path, PLAN | {"side": 32}, 2)
  assert ShardWriter(tmp_path, PLAN | {"side": 64}, 2).is_done(0)
