"""A model on disk or in a bucket, ready for inference: `config.json`, Orbax `params`.

`config.json` is written last, so a folder without one is not a bundle. A path may also
be a place on the hub; see `hub`.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from etils import epath
import flax
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp

from llamagen_jax import storage
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import from_uint8
from llamagen_jax.parallel.mesh import abstract_tree, shardings, unbox
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import hub
from llamagen_jax.weights.deferred import Deferred, write_deferred

FORMAT_VERSION = 1
CONFIG, PARAMS = "config.json", "params"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded image tokenizer."""

  config: TokenizerConfig
  params: Any
  identity: str  # content hash; code shards and transformers name it

  def encode(self, images: jax.Array) -> jax.Array:
    """Returns the codes int32 [B, h, w] of images [B, H, W, 3], uint8 or in [-1, 1].

    A continuous autoencoder returns latents, float32 [B, h, w, C].
    """
    if images.dtype == np.uint8:
      images = from_uint8(images)
    return _encode(self.config, self.params, images)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns float32 images [B, H, W, 3], about [-1, 1], of what `encode` returns."""
    return _decode(self.config, self.params, codes)


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A loaded transformer and the settings that it samples best with."""

  config: GPTConfig
  params: Any  # stacked over layers
  sampling: SamplingConfig
  tokenizer: str  # identity of the tokenizer whose codes it samples
  class_names: tuple[str, ...] = ()
  text_encoder: str = ""  # identity of the T5 whose features it was trained on


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
  _save(path, fields, params)
  return identity


def save_gpt(path: str | os.PathLike, gpt: Transformer) -> None:
  """Writes a transformer bundle; parameters may be functions that return arrays."""
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
  _save(path, fields, params)


def save_judge(path: str | os.PathLike, kind: str, params: Any, **fields) -> None:
  """Writes a network that evaluates, or an adapter; config.json has `fields`, too."""
  _save(path, {"kind": kind, **fields}, params)


def load_judge(
  path: str | os.PathLike, kind: str, abstract: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any], Any]:
  """Reads config.json and parameters, as numpy arrays that every host holds whole.

  Args:
    abstract: config.json -> shapes of the parameters.
  """
  fields = read_config(path, kind)
  params = _load_params(path, abstract(fields), None)
  return fields, jax.tree.map(np.asarray, params)


def load_tokenizer(path: str | os.PathLike, mesh: Mesh | None = None) -> Tokenizer:
  """Reads a tokenizer bundle, onto the first device or sharded over a mesh."""
  config, identity = read_tokenizer_config(path)
  boxed = jax.eval_shape(
    functools.partial(model.init_tokenizer, config), jax.random.key(0)
  )
  return Tokenizer(config, _load_params(path, boxed, mesh), identity)


def load_gpt(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: str | None = None,
  kv_cache: str | None = None,
) -> Transformer:
  """Reads a transformer bundle, onto the first device or sharded over a mesh.

  Args:
    path: folder of the bundle.
    mesh: from `make_mesh`.
    dtype: of activations, "float32" or "bfloat16", where it is not the bundle's.
      Parameters are read as they are stored, in float32.
    kv_cache: of the codes' keys and values in sampling, "float" or "int8", where it is
      not the bundle's.
  """
  fields = read_config(path, "gpt")
  changed = {k: v for k, v in (("dtype", dtype), ("kv_cache", kv_cache)) if v}
  config = GPTConfig(**(fields["config"] | changed))
  return Transformer(
    config,
    _load_params(path, abstract_gpt(config), mesh),
    SamplingConfig.read(fields["sampling"], f"{path}/{CONFIG}: sampling"),
    fields["tokenizer"],
    tuple(fields["class_names"]),
    fields.get("text_encoder", ""),
  )


def read_tokenizer_config(path: str | os.PathLike) -> tuple[TokenizerConfig, str]:
  """Returns the shape and the identity of a tokenizer, without its parameters."""
  fields = read_config(path, "tokenizer")
  return TokenizerConfig(**fields["config"]), fields["identity"]


def kind_of(path: str | os.PathLike) -> str:
  """Returns "gpt", "tokenizer" or a network that evaluates, such as "inception"."""
  return read_config(path)["kind"]


def abstract_gpt(config: GPTConfig) -> Any:
  """Returns the shapes of a transformer's parameters, boxed with their axes' names."""
  return jax.eval_shape(functools.partial(init_gpt, config), jax.random.key(0))


def content_hash(config: TokenizerConfig, params: Any) -> str:
  """Returns the sha256 of config and parameters, whatever their sharding."""
  digest = hashlib.sha256(json.dumps(config.identity_fields, sort_keys=True).encode())
  for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
      value = multihost_utils.process_allgather(value, tiled=True)
    digest.update(path.encode())
    digest.update(np.ascontiguousarray(value, dtype=np.float32).tobytes())
  return digest.hexdigest()


def fingerprint(params: Any) -> str:
  """Returns the identity of loaded parameters, from sums over their bits.

  Integer sums do not depend on their order, so a sharded model has the fingerprint
  that it has on one device, and no host needs to hold it whole. It does not protect
  against forgery.
  """
  digest = hashlib.sha256()
  for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    digest.update(path.encode() + int(_sum_of_bits(value)).to_bytes(4, "little"))
  return digest.hexdigest()


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
  """Returns the sum of bits times an odd number of the flat index, modulo 2^32."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  index = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  return jnp.sum(bits * (index * jnp.uint32(2654435761) * 2 + 1), dtype=jnp.uint32)


def _save(path: str | os.PathLike, fields: dict[str, Any], params: Any) -> None:
  folder = _folder(path)
  config = folder / CONFIG
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
  deferred = any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(params))
  (write_deferred if deferred else _write)(folder / PARAMS, params)
  if jax.process_index() == 0:
    storage.write_json(config, {"format": FORMAT_VERSION, **fields})


def _write(path: epath.Path, params: Any) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, params, force=True)


def _folder(path: str | os.PathLike) -> epath.Path:
  """The absolute path of a bundle; Orbax takes no other, and gs:// is one."""
  if hub.is_spec(path):
    return hub.download(os.fspath(path))
  path = storage.user_path(path)
  return path if path.is_absolute() else path.absolute()


def read_config(path: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
  """Returns the fields of a bundle's config.json, which must be of that kind."""
  config = _folder(path) / CONFIG
  if not config.exists():
    raise UserError(f"{path}: no {CONFIG}, so it is not a bundle, or not a whole one")
  fields = storage.read_json(config)
  if not isinstance(fields, dict) or "kind" not in fields:
    raise UserError(
      f"{path}: its {CONFIG} is not a bundle's; that of a finished training run is"
      " WORKDIR/bundle"
    )
  if fields.get("format") != FORMAT_VERSION:
    raise UserError(
      f"{config}: format {fields.get('format')!r}, expected {FORMAT_VERSION}"
    )
  if kind is not None and fields["kind"] != kind:
    raise UserError(f"{path} is a bundle of kind {fields['kind']!r}, expected {kind!r}")
  return fields


def _load_params(path: str | os.PathLike, boxed: Any, mesh: Mesh | None) -> Any:
  if mesh is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  else:
    sharding = shardings(mesh, boxed)
  abstract, folder = abstract_tree(unbox(boxed), sharding), _folder(path)
  if hub.is_spec(path):
    return hub.read_params(folder, abstract)
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder / PARAMS, abstract)
