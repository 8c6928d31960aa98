"""Keys of images, made on the host: image i of a seed has fold_in(key(seed), i).

The accelerator is not asked, and no seed compiles a program of its own. All 64 bits
of a seed count, where `jax.random.key` looks at 32.
"""

from collections.abc import Sequence

import jax
import numpy as np

from llamagen_jax.errors import UserError

IMPL = "threefry2x32"
SEEDS = 2**64

# Threefry-2x32 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)


def check_seed(seed: int, name: str = "seed") -> None:
  """Refuses a seed that is not a number of 64 bits.

  Raises:
    UserError: names `name`, the flag or argument that it came from.
  """
  if not 0 <= seed < SEEDS:
    raise UserError(f"{name}={seed}: expected 0 .. 2^64 - 1")


def image_keys(seed: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
  """Returns key data, uint32 [B, 2], of the images with these numbers."""
  check_seed(seed)
  rows_B = np.asarray(rows, np.uint32)
  return _threefry((seed >> 32, seed & 0xFFFFFFFF), (np.zeros_like(rows_B), rows_B))


def as_keys(data_B2: jax.Array) -> jax.Array:
  """Returns JAX's keys [B] of key data [B, 2]."""
  return jax.random.wrap_key_data(data_B2, impl=IMPL)


def _threefry(key: tuple[int, int], counts: tuple[np.ndarray, np.ndarray]):
  """Encrypts pairs of numbers [B] by 20 rounds; uint32 [B, 2]."""
  k = [np.uint32(word) for word in key]
  k.append(k[0] ^ k[1] ^ PARITY)
  with np.errstate(over="ignore"):
    a, b = counts[0] + k[0], counts[1] + k[1]
    for i in range(5):
      for turn in ROTATIONS[i % 2]:
        a = a + b
        b = (b << np.uint32(turn)) | (b >> np.uint32(32 - turn))
        b = a ^ b
      a, b = a + k[(i + 1) % 3], b + k[(i + 2) % 3] + np.uint32(i + 1)
  return np.stack([a, b], axis=-1)
