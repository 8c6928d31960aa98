"""A model on disk, ready for inference: `config.json` and Orbax `params`.

`config.json` is written last, so a folder without one is not a bundle.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import flax
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.sampling.config import SamplingConfig
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import VQModel, init_tokenizer
from llamagen_jax.training.mesh import shardings, unbox

FORMAT_VERSION = 1
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded image tokenizer."""

  config: TokenizerConfig
  params: Any
  identity: str  # content hash; code shards and transformers name it

  def encode(self, images: jax.Array) -> jax.Array:
    """Pictures [B, H, W, 3] in [-1, 1] -> int32 codes [B, h, w]."""
    return _apply_tokenizer(self.config, "encode", self.params, images)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Integer codes [B, h, w] -> float32 pictures [B, H, W, 3] in about [-1, 1]."""
    return _apply_tokenizer(self.config, "decode", self.params, codes)


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A loaded transformer and what its pictures are best drawn with."""

  config: GPTConfig
  params: Any  # stacked over layers
  sampling: SamplingConfig
  tokenizer: str  # identity of the tokenizer whose codes it draws
  class_names: tuple[str, ...] = ()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_tokenizer(config, method, params, x):
  return VQModel(config).apply({"params": params}, x, method=method)


def save_tokenizer(
  path: str | pathlib.Path, config: TokenizerConfig, params: Any
) -> str:
  """Writes a tokenizer bundle and returns its identity."""
  identity = content_hash(config, params)
  fields = {
    "kind": "tokenizer",
    "config": dataclasses.asdict(config),
    "identity": identity,
  }
  _save(pathlib.Path(path), fields, params)
  return identity


def save_gpt(path: str | pathlib.Path, gpt: Transformer) -> None:
  """Writes a transformer bundle."""
  fields = {
    "kind": "gpt",
    "config": dataclasses.asdict(gpt.config),
    "sampling": dataclasses.asdict(gpt.sampling),
    "tokenizer": gpt.tokenizer,
    "class_names": gpt.class_names,
  }
  _save(pathlib.Path(path), fields, gpt.params)


def load_tokenizer(path: str | pathlib.Path, mesh: Mesh | None = None) -> Tokenizer:
  """Reads a tokenizer bundle, onto the first device or sharded over a mesh."""
  path = pathlib.Path(path)
  fields = _read_config(path, "tokenizer")
  config = TokenizerConfig(**fields["config"])
  boxed = jax.eval_shape(functools.partial(init_tokenizer, config), jax.random.key(0))
  return Tokenizer(config, _load_params(path, boxed, mesh), fields["identity"])


def load_gpt(path: str | pathlib.Path, mesh: Mesh | None = None) -> Transformer:
  """Reads a transformer bundle, onto the first device or sharded over a mesh."""
  path = pathlib.Path(path)
  fields = _read_config(path, "gpt")
  config = GPTConfig(**fields["config"])
  boxed = jax.eval_shape(functools.partial(init_gpt, config), jax.random.key(0))
  return Transformer(
    config,
    _load_params(path, boxed, mesh),
    SamplingConfig(**fields["sampling"]),
    fields["tokenizer"],
    tuple(fields["class_names"]),
  )


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


def _save(path: pathlib.Path, fields: dict[str, Any], params: Any) -> None:
  config = path / CONFIG
  if jax.process_index() == 0:
    path.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((path / "params").absolute(), params, force=True)
  if jax.process_index() == 0:
    part = config.with_name(f".{CONFIG}.part")
    part.write_text(json.dumps({"format": FORMAT_VERSION, **fields}, indent=1))
    part.rename(config)


def _read_config(path: pathlib.Path, kind: str) -> dict[str, Any]:
  config = path / CONFIG
  if not config.exists():
    raise UserError(f"{path}: no {CONFIG}, so it is not a bundle, or not a whole one")
  fields = json.loads(config.read_text())
  if fields.get("format") != FORMAT_VERSION or fields.get("kind") != kind:
    found = f"kind {fields.get('kind')!r}, format {fields.get('format')!r}"
    raise UserError(f"{config}: {found}; expected {kind!r}, format {FORMAT_VERSION}")
  return fields


def _load_params(path: pathlib.Path, boxed: Any, mesh: Mesh | None) -> Any:
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, unbox(boxed))
  else:
    places = shardings(mesh, boxed)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    unbox(boxed),
    places,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore((path / "params").absolute(), abstract)
