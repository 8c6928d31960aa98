"""Paths that users give, and files that are whole or not there."""

import contextlib
import pathlib

import pytest

from llamagen_jax import UserError
from llamagen_jax.storage import (
  atomic_folder,
  atomic_write,
  in_bucket,
  local_path,
  read_json,
  user_path,
  write_json,
)


def test_a_tilde_is_the_home(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert pathlib.Path(user_path("~/run")) == tmp_path / "run"
  assert local_path("~/run", "--workdir") == tmp_path / "run"


def test_a_bucket_keeps_its_slashes():
  pytest.importorskip("gcsfs")
  path = user_path("gs://bucket/run")
  assert str(path / "x") == "gs://bucket/run/x" and in_bucket(path)


def test_a_bucket_where_only_a_disk_serves_is_refused():
  with pytest.raises(UserError, match="--out=gs://b/x: expected a local path"):
    local_path("gs://b/x", "--out")
  with pytest.raises(UserError, match="found ftp"):
    user_path("ftp://b/x")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / "x.json"
  write_json(path, [1])
  with pytest.raises(OSError, match="full"), atomic_write(path, "w") as file:
    file.write("half")
    raise OSError("full")
  assert read_json(path) == [1] and [*tmp_path.iterdir()] == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
  folder = tmp_path / "images"
  for error in (OSError("full"), None):
    with contextlib.suppress(OSError), atomic_folder(folder) as part:
      part.mkdir()
      (part / str(error)).touch()
      assert not folder.exists()
      if error:
        raise error
  assert [path.name for path in folder.iterdir()] == ["None"]
  assert [*tmp_path.iterdir()] == [folder]


def test_what_is_not_json_is_named(tmp_path):
  (tmp_path / "x.json").write_bytes(b"\xff{")
  with pytest.raises(UserError, match="x.json: not JSON"):
    read_json(tmp_path / "x.json")
