"""The golden numbers, and the rule that synthesizes the weights they belong to."""

import functools
import json
import math
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden() -> dict[str, np.ndarray]:
  numbers = {}
  for name in ("golden.npz", "golden_eval.npz", "golden_beyond.npz", "golden_vae.npz"):
    with np.load(FOLDER / name) as file:
      numbers |= file
  return numbers


@functools.cache
def manifest() -> dict:
  return json.loads((FOLDER / "manifest.json").read_text())


@functools.cache
def eval_manifest() -> dict:
  return json.loads((FOLDER / "manifest_eval.json").read_text())


@functools.cache
def beyond_manifest() -> dict:
  return json.loads((FOLDER / "manifest_beyond.json").read_text())


@functools.cache
def vae_manifest() -> dict:
  """Returns by network: diffusers' names -> LDM's name and the shape."""
  return json.loads((FOLDER / "manifest_vae.json").read_text())


def vae_state_dicts(model: str) -> dict[str, dict[str, np.ndarray]]:
  """Returns a VAE's tensors in the layouts of diffusers and of LDM."""
  names = vae_manifest()[model]
  tensors = synthesize({name: shape for name, (_, shape) in names.items()})
  ldm = {}
  for name, (theirs, shape) in names.items():
    is_matrix = len(shape) == 2  # of the attention: a convolution in LDM
    ldm[theirs] = tensors[name][..., None, None] if is_matrix else tensors[name]
  return {"diffusers": tensors, "kl": ldm}


def state_dict(model: str) -> dict[str, np.ndarray]:
  return synthesize(manifest()["state_dicts"][model])


def synthesize(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Tensors of these names and shapes, without the exceptions to the rule."""
  return {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  x = randn(name, shape)
  if len(shape) >= 2:
    return x * np.float32(math.prod(shape[1:]) ** -0.5)
  if name.endswith(("bias", "running_mean")):
    return x * np.float32(0.1)
  if name.endswith("running_var"):
    return 1 + np.abs(x) * np.float32(0.1)
  return 1 + x * np.float32(0.1)


def randn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  values = _random(name).standard_normal(math.prod(shape))
  return values.astype(np.float32).reshape(shape)


def randint(name: str, high: int, shape: tuple[int, ...]) -> np.ndarray:
  return _random(name).randint(0, high, size=shape)


def _random(name: str) -> np.random.RandomState:
  return np.random.RandomState(zlib.crc32(name.encode()))
