"""A process of a run on several hosts: verbs one after the other, and what it read.

argv[1] is JSON: `commands`, lists of words after `llamagen`; `delay`, seconds added
to every step; `record`, the file that takes what was read, if any; `largest_file`, the
bytes after which a write fails, as on a full disk.
"""

import json
import resource
import sys
import time

from llamagen_jax import logs
from llamagen_jax.commands import cli
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.data.loader import Stream

spec = json.loads(sys.argv[1])
if limit := spec.get("largest_file"):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
keys, rows = [], []
read, host_batches = CodeSource.__getitem__, Stream.host_batches


def recording_read(source, index):
  record = read(source, index)
  if "train" in str(source.folder):
    keys.append(record.key)
  return record


def recording_batches(stream, *where):
  for batch in host_batches(stream, *where):
    time.sleep(spec.get("delay", 0))
    rows.append(batch["codes"].tolist())
    yield batch


CodeSource.__getitem__ = recording_read
Stream.host_batches = recording_batches
logs.show()
code = max(cli.run(command) for command in spec["commands"])
if spec.get("record"):
  with open(spec["record"], "w") as file:
    json.dump({"keys": sorted(set(keys)), "rows": rows}, file)
sys.exit(code)
