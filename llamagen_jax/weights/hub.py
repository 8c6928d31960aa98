"""Bundles on the Hugging Face hub: hub:USER/NAME, or hub:USER/NAME@REVISION.

A repository holds config.json, which is the bundle's and has the checksums of the
weights; the weights as safetensors, in several files if they are large; and a card.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import os
import pathlib
import re
from typing import Any

from etils import epath
import flax
import jax
import numpy as np

from llamagen_jax import storage
from llamagen_jax.errors import UserError
from llamagen_jax.weights.files import read_folder, write_weights

PREFIX = "hub:"
SPEC = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SHA256 = re.compile("[0-9a-f]{64}")
CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
PATTERNS = (CONFIG, "*.safetensors", "*.safetensors.index.json")
FILES = "files"  # field of config.json: sha256 of the other files, by name
LARGEST = 4 * 10**9  # bytes of a file of weights, unless one parameter has more


def is_spec(path: str | os.PathLike) -> bool:
  """Returns whether a bundle is named by its place on the hub."""
  return os.fspath(path).startswith(PREFIX)


def parse(spec: str) -> tuple[str, str | None]:
  """Returns the repository and the revision of hub:USER/NAME@REVISION."""
  match = SPEC.fullmatch(spec)
  if match is None:
    raise UserError(f"{spec}: expected hub:USER/NAME or hub:USER/NAME@REVISION")
  return match["repo"], match["revision"]


@functools.cache  # a command asks for config and parameters; the files are one revision
def download(spec: str) -> epath.Path:
  """Returns the folder of a bundle on the hub, from the local cache if it is there.

  Raises:
    UserError: no such repository, no network and nothing in the cache, or files that
      are not those that were pushed.
  """
  repo, revision = parse(spec)
  hub = _library()
  with _errors(spec, hub):
    found = hub.snapshot_download(
      repo, revision=revision, allow_patterns=list(PATTERNS)
    )
  folder = epath.Path(found)
  _verify(spec, folder)
  return folder


def download_file(repo: str, file: str) -> epath.Path:
  """Returns a large file of any repository, from the local cache if it is there.

  Raises:
    UserError: as `download` does.
  """
  hub = _library()
  with _errors(f"{file} of {repo}", hub):
    path = hub.hf_hub_download(repo, file)
  stored = epath.Path(os.path.realpath(path))
  # The hub names a large file by its sha256, and so does the cache.
  if SHA256.fullmatch(stored.name) and storage.sha256(stored) != stored.name:
    raise UserError(
      f"{file} of {repo}: its sha256 is not the hub's; delete {stored} to download it"
      " again"
    )
  return epath.Path(path)


def upload(folder: pathlib.Path, repo: str, *, private: bool) -> str:
  """Uploads all files of a folder in one commit; returns the address of the repository.

  Raises:
    UserError: the hub refuses it or is not reached.
  """
  hub = _library()
  with _errors(f"{PREFIX}{repo}", hub):
    api = hub.HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
      repo_id=repo, folder_path=folder, commit_message="Upload by llamagen push"
    )
  return str(url)


def write_folder(
  folder: pathlib.Path, fields: Mapping[str, Any], params: Any, card: str
) -> None:
  """Writes what a repository holds: config, weights and card."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  groups = list(_groups(flat))
  names = [WEIGHTS]
  if len(groups) > 1:
    stem, suffix = os.path.splitext(WEIGHTS)
    names = [
      f"{stem}-{i + 1:05d}-of-{len(groups):05d}{suffix}" for i in range(len(groups))
    ]
    weight_map = {key: n for n, keys in zip(names, groups, strict=True) for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    storage.write_json(folder / f"{WEIGHTS}.index.json", index)
  for name, keys in zip(names, groups, strict=True):
    arrays = {key: np.ascontiguousarray(flat[key]) for key in keys}
    write_weights(folder / name, arrays)
  (folder / CARD).write_text(card)
  sums = {name: storage.sha256(folder / name) for name in names}
  storage.write_json(folder / CONFIG, {**fields, FILES: sums})


def read_params(folder: epath.Path, abstract: Any) -> Any:
  """Reads the parameters of a downloaded bundle, a tensor at a time.

  Args:
    folder: from `download`.
    abstract: their shapes and shardings.

  Raises:
    UserError: other names or shapes than these.
  """
  stored = read_folder(folder, (WEIGHTS,))
  expected = flax.traverse_util.flatten_dict(abstract, sep="/")
  wrong = [
    name
    for name in sorted(stored.keys() | expected.keys())
    if name not in stored
    or name not in expected
    or tuple(stored[name].shape) != expected[name].shape
  ]
  if wrong:
    raise UserError(
      f"{folder}: {len(wrong)} parameters are missing, unknown or of another shape than"
      f" {CONFIG} says, such as {', '.join(wrong[:4])}"
    )

  def put(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = np.asarray(stored[name], leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: array[i])

  flat = {name: put(name, leaf) for name, leaf in expected.items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _groups(flat: Mapping[str, Any]) -> Iterator[list[str]]:
  """Yields names of parameters that fit into a file together."""
  group, size = [], 0
  for name, value in flat.items():
    if group and size + value.nbytes > LARGEST:
      yield group
      group, size = [], 0
    group.append(name)
    size += value.nbytes
  yield group


def _verify(spec: str, folder: epath.Path) -> None:
  """Compares the weights with the checksums in config.json."""
  config = folder / CONFIG
  fields = storage.read_json(config) if config.exists() else None
  sums = fields.get(FILES) if isinstance(fields, dict) else None
  if not isinstance(sums, dict) or not sums:
    raise UserError(
      f"{spec} holds no bundle that `llamagen push` wrote; PyTorch weights are read by"
      " `llamagen import-weights`"
    )
  for name, expected in sums.items():
    file = folder / os.path.basename(name)
    if not file.exists():
      raise UserError(f"{spec}: {name} is missing")
    if storage.sha256(file) != expected:
      raise UserError(
        f"{spec}: {name} is not the file that was pushed, its sha256 differs; delete"
        f" {os.path.realpath(file)} to download it again"
      )


def _library():
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(
      "the hub needs its library: pip install 'llamagen_jax[hub]'"
    ) from error
  return huggingface_hub


@contextlib.contextmanager
def _errors(spec: str, hub) -> Iterator[None]:
  """Turns what the library raises into one line; it never holds the token."""
  try:
    yield
  except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
    reason = " ".join(str(error).split())[:300]
    raise UserError(f"{spec}: {reason}") from error
