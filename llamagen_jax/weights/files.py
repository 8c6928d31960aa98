"""Weight files of other systems, read tensor by tensor, and the writing of our own."""

from collections.abc import Mapping
import functools
import json
import os
from typing import Any, NamedTuple

import numpy as np

from llamagen_jax import storage
from llamagen_jax.errors import UserError
from llamagen_jax.weights.pickles import (
  EXTRA,
  Stored,
  TorchFile,
  foreign_kind,
  import_torch,
  local_copy,
  one_line,
)

# Names that wrappers put before every tensor's: torch.compile, DDP, FSDP, DeepSpeed,
# Lightning. torch.compile's may also stand inside a name.
WRAPPERS = (
  "module.", "model.", "_fsdp_wrapped_module.", "_forward_module.",
)  # fmt: skip
COMPILED = "_orig_mod."
LOSSES = "loss."  # the trainers of VQGAN save their loss networks beside the model
SAFETENSORS_TYPES = {
  "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}  # fmt: skip
INDEX = ".index.json"
SUFFIXES = (".pt", ".safetensors")  # of files that are written


class Weights(NamedTuple):
  """What a file of weights holds."""

  tensors: dict[str, Stored]  # by name, without the prefixes that wrappers add
  key: str = ""  # entry of a pickle that they are from; "" = the file itself
  extra: dict[str, Any] = {}  # settings that `write_weights` put beside them


def read_weights(path: str | os.PathLike, key: str | None = None) -> Weights:
  """Opens a file of weights without reading them.

  Args:
    path: `.safetensors`, the index of several, a folder of them, or a PyTorch pickle:
      a state dict or a dict of one with whatever else a trainer saves next to it.
    key: entry of a pickle that holds the weights, with dots between nested ones; by
      default the first of `pickles.KEYS` that holds any.

  Raises:
    UserError: for a file that holds no weights, or that would run code, and for a key
      where there are no entries.
  """
  path = storage.user_path(path)
  if path.is_dir():
    found = Weights(read_folder(path))
  elif not path.is_file():
    raise UserError(f"{path}: no such file")
  elif path.name.endswith(INDEX):
    found = Weights(_read_index(path))
  else:
    found = _read_file(path, key)
  if key and not found.key:
    raise UserError(f"--key={key}: {path} has no entries, only pickles have")
  return found._replace(tensors=_unwrapped(path, found.tensors))


def read_folder(
  folder: str | os.PathLike,
  names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin"),
) -> dict[str, Stored]:
  """Opens the weights in a folder as Hugging Face lays it out.

  Args:
    folder: local or in a bucket.
    names: of the file, in the order of preference; of each, an index of several files
      is taken first.
  """
  folder = storage.user_path(folder)
  for name in names:
    if (folder / f"{name}{INDEX}").exists():
      return _unwrapped(folder, _read_index(folder / f"{name}{INDEX}"))
    if (folder / name).exists():
      return read_weights(folder / name).tensors
  expected = ", ".join(f"{name} or {name}{INDEX}" for name in names)
  raise UserError(f"{folder}: no weights; expected {expected}")


def write_weights(
  path: str | os.PathLike,
  state_dict: Mapping[str, np.ndarray],
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes `.safetensors`, or a pickle that holds the weights under "model".

  Args:
    path: local or in a bucket, of one of SUFFIXES.
    state_dict: arrays by name.
    extra: settings that JSON can hold, for `read_weights`; others pass them over.

  Raises:
    UserError: another suffix.
  """
  path = storage.user_path(path)
  check_suffix(path, "a file of weights")
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = {EXTRA: json.dumps(extra)} if extra else {}
  if path.suffix == ".safetensors":
    metadata = {"format": "pt", **beside}
    content = _safetensors().numpy.save(dict(state_dict), metadata)
    with storage.atomic_write(path) as file:
      file.write(content)
    return
  torch = import_torch()
  tensors = {
    name: torch.from_numpy(np.require(value, requirements=("C", "W")))
    for name, value in state_dict.items()
  }
  with storage.atomic_write(path) as file:
    torch.save({"model": tensors, **beside}, file)


def check_suffix(path: os.PathLike, name: str) -> None:
  """Raises a UserError for a file that `write_weights` cannot write."""
  if os.path.splitext(path)[1] not in SUFFIXES:
    raise UserError(f"{name}: expected a name that ends in {' or '.join(SUFFIXES)}")


def _unwrapped(path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  """The tensors without their losses and without the prefixes that wrappers add."""
  found = {name.replace(COMPILED, ""): value for name, value in tensors.items()}
  if len(found) < len(tensors):
    raise UserError(f"{path}: holds tensors with and without {COMPILED} of one name")
  found = {name: x for name, x in found.items() if not name.startswith(LOSSES)}
  while prefix := next((w for w in WRAPPERS if _all_start(found, w)), ""):
    found = {name.removeprefix(prefix): value for name, value in found.items()}
    found = {name: x for name, x in found.items() if not name.startswith(LOSSES)}
  return found


def _all_start(names: Mapping[str, Any], prefix: str) -> bool:
  return bool(names) and all(name.startswith(prefix) for name in names)


def _read_index(index) -> dict[str, Stored]:
  """Tensors of the files that an index lists."""
  fields = storage.read_json(index)
  files = fields.get("weight_map") if isinstance(fields, dict) else None
  if not isinstance(files, dict) or not files:
    raise UserError(f"{index}: not an index of weights, it has no weight_map")
  tensors = {}
  for file in sorted(set(files.values())):
    path = index.parent / file
    if not path.exists():
      raise UserError(f"{index} lists {file}, which is not there")
    stored = _read_file(path).tensors
    for name in (name for name, holder in files.items() if holder == file):
      if name not in stored:
        raise UserError(f"{path}: no tensor {name}, which {index.name} lists there")
      tensors[name] = stored[name]
  return tensors


def _read_file(path, key: str | None = None) -> Weights:
  with path.open("rb") as file:
    head = file.read(64)
  is_json = head[8:9] == b"{"  # of a safetensors file's header, after its length
  if path.suffix == ".safetensors" or is_json:
    if not is_json and (kind := foreign_kind(head)):
      raise UserError(f"{path}: no safetensors file, but {kind}")
    return _read_safetensors(path)
  file = TorchFile(path, key, head)
  return Weights(file.tensors(), file.key, _settings(file.extra))


def _read_safetensors(path) -> Weights:
  safetensors, file = _safetensors(), local_copy(path)

  def read(name: str) -> np.ndarray:
    with safetensors.safe_open(file, framework="numpy") as opened:
      return opened.get_tensor(name)

  try:
    with safetensors.safe_open(file, framework="numpy") as opened:
      slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
      extra = (opened.metadata() or {}).get(EXTRA)
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{path}: no safetensors file, or not a whole one: {one_line(error)}"
    ) from error
  tensors = {
    name: Stored(
      tuple(part.get_shape()),
      SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype()),
      functools.partial(read, name),
    )
    for name, part in slices.items()
  }
  return Weights(tensors, "", _settings(extra))


def _settings(text: str | None) -> dict[str, Any]:
  return json.loads(text) if text else {}


def _safetensors():
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise UserError(
      "safetensors files need their library: pip install safetensors"
    ) from error
  return safetensors
