"""Writing a checkpoint of parameters that are read one at a time.

Written against Orbax 0.12.8: `DeferredHandler` extends `NumpyHandler.serialize`, which
Orbax calls with all values at once and awaits once, so that the arrays of a whole model
would be in memory together.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

# Upper bound of the bytes of a parameter that are written as one file.
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Deferred:
  """A parameter that is read when it is written, so that no model is held whole."""

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]


class DeferredHandler(ocp.type_handlers.NumpyHandler):
  """Writes `Deferred` leaves as the arrays they load, one at a time."""

  async def serialize(self, values, infos, args=None):
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize([value.load()], [info], [arg]):
        written.result()
    return []


def write_deferred(path: epath.Path, params: Any) -> None:
  """Writes a tree of `Deferred`, each in files of a layer or less.

  Args:
    path: absolute; the folder of the checkpoint.
    params: the tree.
  """
  registry = ocp.type_handlers.create_type_handler_registry(
    (Deferred, DeferredHandler(deepcopy_host_arrays=False))
  )
  save_args = jax.tree.map(
    lambda leaf: ocp.SaveArgs(
      chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if len(leaf.shape) > 2 else ()
    ),
    params,
  )
  with _errors_only():
    # Without OCDBT, which collects all chunks in memory before it writes them.
    handler = ocp.PyTreeCheckpointHandler(
      use_ocdbt=False, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(path, ocp.args.PyTreeSave(params, save_args), force=True)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
  """Keeps Orbax from warning that OCDBT is off."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)
