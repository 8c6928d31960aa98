"""Classifier-free guidance (arXiv 2207.12598) and its schedules over an image."""

import jax
import jax.numpy as jnp

from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES, BatchSampling


def scale_at(settings: BatchSampling, index: jax.Array, image_tokens: int) -> jax.Array:
  """Returns the guidance scale [B] of the code with this index; 1 = no guidance.

  With s the guidance_scale, p the guidance_power, t the index, T image_tokens:
    constant: s
    linear: 1 + (s - 1) t / T
    power-cosine (RAR, arXiv 2411.00776): 1 + (s - 1) (1 - cos(pi (t / T)^p)) / 2
  and 1 before guidance_start and after guidance_stop.

  guidance_stop counts decode steps: code 0 comes from the prefill, so step n samples
  code n + 1.

  Args:
    settings: [B], one row a code to sample: of B images, or of every code of a
      window.
    index: number of the code, int32; or [B], one a row.
    image_tokens: T, the codes of an image.
  """
  progress = jnp.broadcast_to(index / image_tokens, settings.guidance_power.shape)
  shares = {
    "constant": jnp.ones_like(progress),
    "linear": progress,
    "power-cosine": (1 - jnp.cos(jnp.pi * progress**settings.guidance_power)) / 2,
  }
  share = jnp.select(
    [settings.guidance_schedule == i for i in range(len(GUIDANCE_SCHEDULES))],
    [shares[name] for name in GUIDANCE_SCHEDULES],
  )
  stopped = (settings.guidance_stop >= 0) & (index - 1 > settings.guidance_stop)
  off = stopped | (index < settings.guidance_start)
  return jnp.where(off, 1.0, 1 + (settings.guidance_scale - 1) * share)


def guide(cond_BV: jax.Array, uncond_BV: jax.Array, scale_B: jax.Array) -> jax.Array:
  """Returns uncond + s (cond - uncond), [B, V], and exactly cond where s is 1."""
  scale_B1 = scale_B[:, None]
  guided_BV = uncond_BV + scale_B1 * (cond_BV - uncond_BV)
  return jnp.where(scale_B1 == 1, cond_BV, guided_BV)
