"""What a command prints of its log."""

import subprocess
import sys

LINES = '''
from absl import logging
import logging as plain
from llamagen_jax import logs
logs.show()
import orbax.checkpoint  # its INFO lines are noise
from llamagen_jax.parallel import mesh
mesh.logging.info("not from a file of the package")
logging.warning("of a library")
plain.getLogger("orbax").info("noise")
plain.getLogger("other").error("an error")
exec(compile("""
try:
  raise ValueError("of a save")
except ValueError:
  logging.exception("save failed")
""", "/packages/orbax/x.py", "exec"))
plain.getLogger("asyncio").error("<Task of /packages/orbax/x.py> failed")
exec(compile("logging.info('resumed from step %d', 7)", logs.__file__, "exec"))
'''


def test_own_lines_from_info_and_others_from_warning():
  found = subprocess.run(
    [sys.executable, "-c", LINES], capture_output=True, text=True, check=True
  )
  lines = [line.split(" ", 1)[1] for line in found.stderr.splitlines()]
  texts = [line for line in lines if "libtpu" not in line]
  assert any(line.endswith("resumed from step 7") for line in texts), found.stderr
  assert any(line.endswith("of a library") for line in texts)
  assert any(line.endswith("an error") for line in texts)
  assert "Traceback" not in found.stderr and "save failed" not in found.stderr
  assert "noise" not in found.stderr and "not from a file" not in found.stderr
  assert "warning: " in found.stderr and found.stdout == ""
