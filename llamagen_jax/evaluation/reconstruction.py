"""How well a tokenizer keeps pictures: PSNR and use of the codebook."""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from llamagen_jax.data.codes import perplexity
from llamagen_jax.data.loader import Batch
from llamagen_jax.pictures import from_uint8, to_uint8
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import VQModel


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """What `reconstruct` measured over a set of pictures."""

  psnr: float  # dB, mean over pictures
  usage: float  # share of the codebook that the set uses
  perplexity: float  # of the codes' frequencies
  originals: np.ndarray  # the first pictures, uint8
  pictures: np.ndarray  # their reconstructions, uint8


def psnr(original: jax.Array, reconstruction: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB per picture, [B, H, W, 3] in [0, 1] -> [B]."""
  mse_B = jnp.mean((original - reconstruction) ** 2, axis=(1, 2, 3))
  return -10 * jnp.log10(mse_B)


def reconstruct(
  config: TokenizerConfig, params: Any, batches: Iterable[Batch], shown: int
) -> Reconstruction:
  """Encodes and decodes batches of {image uint8, weight}; keeps `shown` examples."""
  step = _compiled(config)
  total = weight = 0.0
  code_counts = np.zeros(config.codebook_size, np.int64)
  originals = pictures = None
  for batch in batches:
    found = step(params, batch)
    total += float(found["psnr"])
    weight += float(found["weight"])
    code_counts += np.asarray(found["code_counts"])
    if originals is None:
      pair = (batch["image"], found["pictures"])
      originals, pictures = (
        np.asarray(multihost_utils.process_allgather(x, tiled=True))[:shown]
        for x in pair
      )
  return Reconstruction(
    psnr=total / weight,
    usage=np.count_nonzero(code_counts) / config.codebook_size,
    perplexity=perplexity(code_counts),
    originals=originals,
    pictures=pictures,
  )


@functools.lru_cache(maxsize=4)
def _compiled(config: TokenizerConfig) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  model = VQModel(config)

  @jax.jit
  def step(params, batch):
    images = from_uint8(batch["image"])
    codes = model.apply({"params": params}, images, method="encode")
    pictures = to_uint8(model.apply({"params": params}, codes, method="decode"))
    # The original measures rounded reconstructions against the float pictures.
    psnr_B = psnr((images + 1) / 2, pictures.astype(jnp.float32) / 255)
    weight_Bhw = jnp.broadcast_to(batch["weight"][:, None, None], codes.shape)
    return {
      "psnr": jnp.sum(psnr_B * batch["weight"]),
      "weight": jnp.sum(batch["weight"]),
      "code_counts": jnp.zeros(config.codebook_size, jnp.int32)
      .at[codes.ravel()]
      .add(weight_Bhw.ravel().astype(jnp.int32)),
      "pictures": pictures,
    }

  return step
