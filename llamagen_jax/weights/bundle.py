"""A model on disk, ready for inference: `config.json` and Orbax `params`.

`config.json` is written last, so a folder without one is not a bundle.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from absl import logging
from etils import epath
import flax
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import from_uint8
from llamagen_jax.parallel.mesh import abstract_tree, shardings, unbox
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig

FORMAT_VERSION = 1
CONFIG = "config.json"
# Upper bound of a piece of a parameter that is written as one file.
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded image tokenizer."""

  config: TokenizerConfig
  params: Any
  identity: str  # content hash; code shards and transformers name it

  def encode(self, images: jax.Array) -> jax.Array:
    """Images [B, H, W, 3], uint8 or in [-1, 1] -> int32 codes [B, h, w]."""
    if images.dtype == np.uint8:
      images = from_uint8(images)
    return _encode(self.config, self.params, images)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Integer codes [B, h, w] -> float32 images [B, H, W, 3] in about [-1, 1]."""
    return _decode(self.config, self.params, codes)


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A loaded transformer and what its images are best drawn with."""

  config: GPTConfig
  params: Any  # stacked over layers
  sampling: SamplingConfig
  tokenizer: str  # identity of the tokenizer whose codes it draws
  class_names: tuple[str, ...] = ()
  text_encoder: str = ""  # identity of the T5 whose features it was trained on


@dataclasses.dataclass(frozen=True)
class Deferred:
  """A parameter that is read when it is written, so that no model is held whole."""

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]


_encode = jax.jit(model.encode, static_argnums=0)
_decode = jax.jit(model.decode, static_argnums=0)


def save_tokenizer(
  path: str | os.PathLike, config: TokenizerConfig, params: Any
) -> str:
  """Writes a tokenizer bundle and returns its identity."""
  identity = content_hash(config, params)
  fields = {
    "kind": "tokenizer",
    "config": dataclasses.asdict(config),
    "identity": identity,
  }
  _save(epath.Path(path), fields, params)
  return identity


def save_gpt(path: str | os.PathLike, gpt: Transformer) -> None:
  """Writes a transformer bundle; parameters may be functions that give arrays."""
  fields = {
    "kind": "gpt",
    "config": dataclasses.asdict(gpt.config),
    "sampling": dataclasses.asdict(gpt.sampling),
    "tokenizer": gpt.tokenizer,
    "class_names": gpt.class_names,
    "text_encoder": gpt.text_encoder,
  }
  params = gpt.params
  if any(callable(leaf) for leaf in jax.tree.leaves(params)):
    params = jax.tree.map(
      lambda leaf, load: Deferred(leaf.shape, leaf.dtype, load),
      unbox(abstract_gpt(gpt.config)),
      params,
    )
  _save(epath.Path(path), fields, params)


def save_judge(path: str | os.PathLike, kind: str, params: Any, **fields) -> None:
  """Writes a network that evaluates; `fields` is what else its config.json holds."""
  _save(epath.Path(path), {"kind": kind, **fields}, params)


def load_judge(
  path: str | os.PathLike, kind: str, abstract: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any], Any]:
  """Reads config.json and parameters, as numpy arrays that every host holds whole.

  Args:
    abstract: config.json -> shapes of the parameters.
  """
  path = epath.Path(path)
  fields = _read_config(path, kind)
  params = _load_params(path, abstract(fields), None)
  return fields, jax.tree.map(np.asarray, params)


def load_tokenizer(path: str | os.PathLike, mesh: Mesh | None = None) -> Tokenizer:
  """Reads a tokenizer bundle, onto the first device or sharded over a mesh."""
  path = epath.Path(path)
  config, identity = read_tokenizer_config(path)
  boxed = jax.eval_shape(
    functools.partial(model.init_tokenizer, config), jax.random.key(0)
  )
  return Tokenizer(config, _load_params(path, boxed, mesh), identity)


def load_gpt(
  path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> Transformer:
  """Reads a transformer bundle, onto the first device or sharded over a mesh.

  Args:
    path: folder of the bundle.
    mesh: from `make_mesh`.
    dtype: of activations, "float32" or "bfloat16", where it is not the bundle's.
      Parameters are read as they are stored, in float32.
  """
  path = epath.Path(path)
  fields = _read_config(path, "gpt")
  config = GPTConfig(**(fields["config"] | ({"dtype": dtype} if dtype else {})))
  return Transformer(
    config,
    _load_params(path, abstract_gpt(config), mesh),
    SamplingConfig(**fields["sampling"]),
    fields["tokenizer"],
    tuple(fields["class_names"]),
    fields.get("text_encoder", ""),
  )


def read_tokenizer_config(path: str | os.PathLike) -> tuple[TokenizerConfig, str]:
  """Shape and identity of a tokenizer bundle, without its parameters."""
  fields = _read_config(epath.Path(path), "tokenizer")
  return TokenizerConfig(**fields["config"]), fields["identity"]


def kind_of(path: str | os.PathLike) -> str:
  """ "gpt", "tokenizer" or a network that evaluates, such as "inception"."""
  return _read_config(epath.Path(path))["kind"]


def abstract_gpt(config: GPTConfig) -> Any:
  """Shapes of a transformer's parameters, boxed with the names of their axes."""
  return jax.eval_shape(functools.partial(init_gpt, config), jax.random.key(0))


def content_hash(config: TokenizerConfig, params: Any) -> str:
  """sha256 over the config and every parameter, independent of sharding."""
  digest = hashlib.sha256(
    json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
  )
  for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
      value = multihost_utils.process_allgather(value, tiled=True)
    digest.update(path.encode())
    digest.update(np.ascontiguousarray(value, dtype=np.float32).tobytes())
  return digest.hexdigest()


def fingerprint(params: Any) -> str:
  """Identity of loaded parameters, from sums over their bits.

  Integer sums come out alike in every order, so a model that is sharded has the
  fingerprint that it has on one device, and no host needs to hold it. Not meant
  against forgery.
  """
  digest = hashlib.sha256()
  for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    digest.update(path.encode() + int(_sum_of_bits(value)).to_bytes(4, "little"))
  return digest.hexdigest()


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
  """sum of bits times an odd number that depends on the place, modulo 2^32."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  return jnp.sum(bits * (place * jnp.uint32(2654435761) * 2 + 1), dtype=jnp.uint32)


def _save(path: epath.Path, fields: dict[str, Any], params: Any) -> None:
  config = path / CONFIG
  if jax.process_index() == 0:
    path.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
  deferred = any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(params))
  (_write_deferred if deferred else _write)(_absolute(path / "params"), params)
  if jax.process_index() == 0:
    part = config.with_name(f".{CONFIG}.part")
    part.write_text(json.dumps({"format": FORMAT_VERSION, **fields}, indent=1))
    part.rename(config)


def _write(path: epath.Path, params: Any) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, params, force=True)


def _write_deferred(path: epath.Path, params: Any) -> None:
  """Writes one parameter after the other, each in files of a layer or less."""
  registry = ocp.type_handlers.create_type_handler_registry(
    (Deferred, _DeferredHandler(deepcopy_host_arrays=False))
  )
  save_args = jax.tree.map(
    lambda leaf: ocp.SaveArgs(
      chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if len(leaf.shape) > 2 else ()
    ),
    params,
  )
  with _errors_only():
    # Without OCDBT, which collects all pieces in memory before it writes them.
    handler = ocp.PyTreeCheckpointHandler(
      use_ocdbt=False, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(path, ocp.args.PyTreeSave(params, save_args), force=True)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
  """Keeps Orbax from warning of what `_write_deferred` does without."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
  """Writes `Deferred` leaves as the arrays they give, one at a time."""

  async def serialize(self, values, infos, args=None):
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize([value.load()], [info], [arg]):
        written.result()
    return []


def _absolute(path: epath.Path) -> epath.Path:
  return path if path.is_absolute() else path.absolute()  # gs:// is absolute


def _read_config(path: epath.Path, kind: str | None = None) -> dict[str, Any]:
  config = path / CONFIG
  if not config.exists():
    raise UserError(f"{path}: no {CONFIG}, so it is not a bundle, or not a whole one")
  fields = json.loads(config.read_text())
  wrong_kind = kind is not None and fields.get("kind") != kind
  if fields.get("format") != FORMAT_VERSION or wrong_kind:
    found = f"kind {fields.get('kind')!r}, format {fields.get('format')!r}"
    raise UserError(f"{config}: {found}; expected {kind!r}, format {FORMAT_VERSION}")
  return fields


def _load_params(path: epath.Path, boxed: Any, mesh: Mesh | None) -> Any:
  if mesh is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  else:
    sharding = shardings(mesh, boxed)
  abstract = abstract_tree(unbox(boxed), sharding)
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(_absolute(path / "params"), abstract)
