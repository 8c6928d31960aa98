"""Classifier-free guidance (arXiv 2207.12598) and its schedules over an image."""

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.sampling_config import SCHEDULES, BatchSampling


def scale_at(rows: BatchSampling, index: jax.Array, image_tokens: int) -> jax.Array:
  """Returns the guidance scale [B] of the code with this index; 1 = no guidance.

  linear: 1 + (s - 1) t / T. power-cosine (RAR, arXiv 2411.00776):
  1 + (s - 1) (1 - cos(pi (t / T)^p)) / 2. Code 0 comes from the prefill, so
  decode step n samples code n + 1.

  Args:
    rows: settings of B images.
    index: number of the code, int32; or [B], where every image has its own.
    image_tokens: T, the codes of an image.
  """
  progress = index / image_tokens
  cosine = (1 - jnp.cos(jnp.pi * progress**rows.guidance_power)) / 2
  share = jnp.select(
    [rows.guidance_schedule == i for i in range(len(SCHEDULES))],
    [jnp.ones_like(cosine), jnp.full_like(cosine, progress), cosine],
  )
  stopped = (rows.guidance_stop >= 0) & (index - 1 > rows.guidance_stop)
  off = stopped | (index < rows.guidance_start)
  return jnp.where(off, 1.0, 1 + (rows.guidance_scale - 1) * share)


def guide(cond_BV: jax.Array, uncond_BV: jax.Array, scale_B: jax.Array) -> jax.Array:
  """Returns uncond + s (cond - uncond), [B, V], and exactly cond where s is 1."""
  scale_B1 = scale_B[:, None]
  guided_BV = uncond_BV + scale_B1 * (cond_BV - uncond_BV)
  return jnp.where(scale_B1 == 1, cond_BV, guided_BV)
