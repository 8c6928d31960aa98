"""The emulated bucket answers every client that the package has."""

import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llamagen_jax.storage import read_json, write_json
from tests.gcs import names

pytestmark = pytest.mark.extra


def test_json_is_written_and_read(bucket):
  write_json(bucket / "folder" / "x.json", [1])
  assert read_json(bucket / "folder" / "x.json") == [1]
  assert names(bucket) == ["folder/x.json"]


def test_arrays_of_orbax_are_written_and_read(bucket):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(bucket / "state", {"x": np.arange(3)})
    checkpointer.wait_until_finished()
    found = checkpointer.restore(bucket / "state")["x"]
  np.testing.assert_array_equal(found, [0, 1, 2])


def test_array_record_reads_the_bucket_itself(bucket, tmp_path):
  path = tmp_path / "x.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  writer.write(b"abc")
  writer.close()
  (bucket / "x.array_record").write_bytes(path.read_bytes())
  reader = array_record_module.ArrayRecordReader(str(bucket / "x.array_record"))
  assert reader.read([0]) == [b"abc"]


def test_a_child_process_finds_it(bucket):
  (bucket / "x").write_text("1")
  command = f"from etils import epath; print(epath.Path('{bucket}/x').read_text())"
  assert subprocess.check_output([sys.executable, "-c", command]) == b"1\n"
