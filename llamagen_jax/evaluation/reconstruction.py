"""How well a tokenizer keeps images, and how much of its codebook it uses."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from llamagen_jax.data.codes import perplexity
from llamagen_jax.data.loader import Batch
from llamagen_jax.errors import UserError
from llamagen_jax.images import from_uint8, to_uint8
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.vision.lpips import lpips

SSIM_WINDOW = 7
SSIM_K1, SSIM_K2 = 0.01, 0.03
DISTANCES = ("psnr", "ssim", "ssim_lg", "lpips")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """The measurements of `reconstruct` over a set of images."""

  psnr: float  # dB, mean over images, as the others
  ssim: float  # of images in [0, 1]
  ssim_lg: float  # with the range 2 that LlamaGen's published SSIM assumes
  lpips: float | None  # where LPIPS's weights were given
  usage: float | None  # share of the codebook that the set uses, where there is one
  perplexity: float | None  # of the codes' frequencies
  images: int  # measured ones
  originals: np.ndarray  # the first images, uint8
  reconstructions: np.ndarray  # the same after encoding and decoding, uint8

  @property
  def metrics(self) -> dict[str, float]:
    """Returns all numbers by name."""
    values = {name: getattr(self, name) for name in DISTANCES}
    values |= {"usage": self.usage, "perplexity": self.perplexity}
    return {name: value for name, value in values.items() if value is not None}


def psnr(original: jax.Array, reconstruction: jax.Array) -> jax.Array:
  """Returns the peak signal-to-noise ratio in dB of images in [0, 1], [B].

  At most 100: a blank image may come back as it is, and would make a mean infinite.
  """
  mse_B = jnp.mean((original - reconstruction) ** 2, axis=(1, 2, 3))
  return -10 * jnp.log10(jnp.maximum(mse_B, 1e-10))


def ssim(x_BHWC: jax.Array, y_BHWC: jax.Array, data_range: float) -> jax.Array:
  """Returns the structural similarity of every image, [B].

  Wang et al., Image Quality Assessment (2004), equation 13, with a uniform window of
  7 pixels, sample variances, windows that lie inside the image, and the mean over
  channels: scikit-image's default, by which tokenizers are compared.
  """
  samples = SSIM_WINDOW**2
  unbiased = samples / (samples - 1)
  # Around a common middle the squares are small: nothing cancels in float32.
  middle = (jnp.mean(x_BHWC) + jnp.mean(y_BHWC)) / 2
  x, y = x_BHWC - middle, y_BHWC - middle
  mean_x, mean_y = _window_mean(x), _window_mean(y)
  variance_x = unbiased * (_window_mean(x * x) - mean_x**2)
  variance_y = unbiased * (_window_mean(y * y) - mean_y**2)
  covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
  mean_x, mean_y = mean_x + middle, mean_y + middle
  c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
  luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
  structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
  return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window_mean(x_BHWC: jax.Array) -> jax.Array:
  window = (1, SSIM_WINDOW, SSIM_WINDOW, 1)
  total = jax.lax.reduce_window(x_BHWC, 0.0, jax.lax.add, window, (1,) * 4, "VALID")
  return total / SSIM_WINDOW**2


def reconstruct(
  config: TokenizerConfig,
  params: Any,
  batches: Iterable[Batch],
  shown: int,
  lpips_params: Any = None,
  keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Reconstruction:
  """Encodes and decodes batches of {image uint8, weight}.

  Args:
    shown: examples of the first batch that the result holds.
    lpips_params: of `vision.lpips`; without them LPIPS is not measured.
    keep: is given the originals and the reconstructions of every batch, uint8,
      without bad images.

  Works on all hosts at once; every host gets the same numbers.
  """
  step = _compiled(config)
  totals = dict.fromkeys((*DISTANCES, "weight"), 0.0)
  code_counts = np.zeros(config.codebook_size, np.int64)
  originals = reconstructions = None
  steps = ((batch, step(params, lpips_params, batch)) for batch in batches)
  for batch, outputs in _one_behind(steps):
    for name in totals:
      totals[name] += float(outputs[name])
    code_counts += np.asarray(outputs["code_counts"])
    if originals is None:
      originals = _gathered(batch["image"])[:shown]
      reconstructions = _gathered(outputs["images"])[:shown]
    if keep is not None:
      good = _gathered(batch["weight"]) > 0
      keep(_gathered(batch["image"])[good], _gathered(outputs["images"])[good])
  weight = totals.pop("weight")
  if not weight:
    raise UserError("no image of the source could be used; the log says why")
  means = {name: total / weight for name, total in totals.items()}
  if lpips_params is None:
    means["lpips"] = None
  means |= dict.fromkeys(("usage", "perplexity"))
  if not config.continuous:
    means["usage"] = np.count_nonzero(code_counts) / config.codebook_size
    means["perplexity"] = perplexity(code_counts)
  return Reconstruction(
    **means,
    images=round(weight),
    originals=originals,
    reconstructions=reconstructions,
  )


def _one_behind(items: Iterable[Any]) -> Iterator[Any]:
  """Yields every item after the next was made, so that the device never waits."""
  waiting = []
  for item in items:
    yield from waiting
    waiting = [item]
  yield from waiting


def _gathered(x: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@functools.lru_cache(maxsize=4)
def _compiled(config: TokenizerConfig) -> Callable[..., dict[str, jax.Array]]:
  @jax.jit
  def step(params, lpips_params, batch):
    images, weight_B = from_uint8(batch["image"]), batch["weight"]
    codes = model.encode(config, params, images)
    decoded = model.decode(config, params, codes)
    rounded = to_uint8(decoded)
    # The original measures rounded reconstructions against the float images.
    x, y = (images + 1) / 2, rounded.astype(jnp.float32) / 255
    found = {
      "psnr": psnr(x, y),
      "ssim": ssim(x, y, 1.0),
      "ssim_lg": ssim(x, y, 2.0),
      "lpips": jnp.zeros_like(weight_B),
      "weight": jnp.ones_like(weight_B),
    }
    if lpips_params is not None:
      found["lpips"] = lpips(lpips_params, images, decoded, "float32")
    code_counts = jnp.zeros(config.codebook_size, jnp.int32)
    if not config.continuous:
      weight_Bhw = jnp.broadcast_to(weight_B[:, None, None], codes.shape)
      code_counts = code_counts.at[codes.ravel()].add(
        weight_Bhw.ravel().astype(jnp.int32)
      )
    # What fills up a batch may have no finite value.
    sums = {
      name: jnp.sum(jnp.where(weight_B > 0, value_B * weight_B, 0))
      for name, value_B in found.items()
    }
    return sums | {"code_counts": code_counts, "images": rounded}

  return step
