"""Set before JAX is imported: programs that several tests share are compiled once."""

import os
import pathlib
import tempfile

CACHE = (
  pathlib.Path(tempfile.gettempdir()) / f"llamagen_jax_test_programs_{os.getuid()}"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
