"""A storage that is down for a while: nothing is called bad or damaged for it."""

import errno

from etils import epath
import pytest

from llamagen_jax.data import caption_parquet, caption_tars
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.data.sources import open_source
from llamagen_jax.errors import RunFailed
from llamagen_jax.storage import is_transient
from tests import tiny

KEYS = FieldNames("", "caption")


class Down:
  """A file that opens, and then does not answer."""

  def __init__(self, error: Exception):
    self._error = error

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def __getattr__(self, name):
    raise self._error


def unavailable() -> Exception:
  """What gcsfs raises for HTTP 503, which is no OSError."""
  retry = pytest.importorskip("gcsfs.retry")
  return retry.HttpError({"code": 503, "message": "down"})


@pytest.mark.parametrize(
  "make",
  [
    lambda: ConnectionResetError("cut"),
    lambda: OSError(errno.EMFILE, "too many open files"),
    pytest.param(unavailable, marks=pytest.mark.extra),
  ],
)
def test_files_are_not_called_broken(tmp_path, monkeypatch, make):
  tiny.write_tar(tmp_path / "0.tar", 0, 2)
  (tmp_path / "0.parquet").touch()
  for module, shards in (
    (caption_tars, caption_tars.Tars((f"{tmp_path}/0.tar",), KEYS)),
    (caption_parquet, caption_parquet.Parquets((f"{tmp_path}/0.parquet",), KEYS, "")),
  ):
    path = type("Path", (), {"open": lambda *_: Down(make())})()
    monkeypatch.setattr(module, "user_path", lambda _, path=path: path)
    with pytest.raises(RunFailed, match=r"/0\.\w+: storage is down"):
      list(shards.read(0))


def test_images_are_not_called_bad(tmp_path, monkeypatch):
  source = open_source(f"folder:{tiny.write_images(tmp_path / 'images', count=2)}")

  def down(path):
    raise TimeoutError("no answer")

  monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", down)
  with pytest.raises(RunFailed, match="00.png: storage is down .no answer"):
    source[0]


@pytest.mark.parametrize("status", ["UNAVAILABLE: try again", "DATA_LOSS: bad chunk"])
def test_shards_are_called_damaged_for_their_bytes_alone(tmp_path, status):
  source = CodeSource(tiny.write_codes(tmp_path / "codes"))

  class Reader(list):
    def __getitem__(self, index):
      raise RuntimeError(status)

  source._records._source = Reader()
  if "LOSS" in status:
    with pytest.raises(Exception, match="codes record 3 is damaged .DATA_LOSS"):
      source[3]
  else:
    with pytest.raises(RunFailed, match="codes: storage is down .UNAVAILABLE"):
      source[3]


def test_a_file_may_have_any_name():
  """Also one that is a status of storage."""
  assert not is_transient(
    FileNotFoundError(errno.ENOENT, "gone", "/data/ABORTED/1.jpg")
  )
