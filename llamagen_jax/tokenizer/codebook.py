"""Keeping a codebook in use: starting it from data, and reviving dead rows.

Rows start as uniform noise in the published recipe, and those that no latent ever
picks get no gradient. Both cures here put rows where latents are. Axes: N latents,
K codes, C code width, W codes of the window.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.tokenizer.quantizer import (
  l2_normalize,
  nearest_codes,
  squared_distances,
)

WINDOW = 65536  # codes over which use is measured, as the original does
NEVER = -1  # an entry of the window that holds no code yet
KMEANS_ROUNDS = 10
JITTER = 1e-3  # tells copies of a latent apart


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
  """How rows start, and when unused ones are replaced by latents of a batch."""

  init: str = "uniform"  # uniform | data (latents of the first batch) | kmeans
  restart_every: int = 0  # steps between replacing dead rows; 0 = never
  # RobustTok (arXiv 2503.08354): the decoder trains on codes that a transformer might
  # confuse. Of this share of the images some codes become one of the nearest rows.
  perturbed_images: float = 0.0
  perturbed_codes: tuple[float, ...] = (1.0, 0.5)  # share of theirs, first and last
  perturbation_steps: tuple[int, ...] = (0, 0)  # between which the share moves
  perturbation_rows: int = 100  # of the nearest, one is taken

  def __post_init__(self):
    if self.init not in ("uniform", "data", "kmeans"):
      raise UserError(f"codebook.init={self.init!r}: expected uniform, data or kmeans")
    shares = (self.perturbed_images, *self.perturbed_codes)
    if not all(0 <= share <= 1 for share in shares) or len(shares) != 3:
      raise UserError(
        "codebook.perturbed_images and both codebook.perturbed_codes: expected shares"
        f" 0 .. 1, found {shares}"
      )
    steps = self.perturbation_steps
    if len(steps) != 2 or steps[0] > steps[1] or self.perturbation_rows < 1:
      raise UserError(
        f"codebook.perturbation_steps={steps}: expected a first and a last step, and"
        " codebook.perturbation_rows >= 1"
      )


def empty_window() -> jax.Array:
  return jnp.full((WINDOW,), NEVER, jnp.int32)


def push(window_W: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns the window after these codes, the newest last."""
  return jnp.concatenate([window_W, codes.ravel()])[-WINDOW:]


def counts(window_W: jax.Array, size: int) -> jax.Array:
  """Returns how often every code is in the window, int32 [K]."""
  places = jnp.where(window_W == NEVER, size, window_W)  # out of range: dropped
  return jnp.zeros(size, jnp.int32).at[places].add(1, mode="drop")


def usage(counts_K: jax.Array) -> dict[str, jax.Array]:
  """Returns the share of rows in use, and exp of the entropy of their frequencies."""
  share_K = counts_K / jnp.maximum(1, jnp.sum(counts_K))
  entropy = -jnp.sum(jax.scipy.special.xlogy(share_K, share_K))
  return {"usage": jnp.mean(counts_K > 0), "perplexity": jnp.exp(entropy)}


def random_rows(latents_NC: jax.Array, size: int, key: jax.Array) -> jax.Array:
  """Returns random latents [K, C], each at most once as long as there are enough."""
  draw_key, jitter_key = jax.random.split(key)
  N, C = latents_NC.shape
  picked = jax.random.choice(draw_key, N, (size,), replace=size > N)
  return latents_NC[picked] + JITTER * jax.random.normal(jitter_key, (size, C))


def kmeans_rows(
  latents_NC: jax.Array, size: int, key: jax.Array, sphere: bool
) -> jax.Array:
  """Returns centres of latents [K, C] by Lloyd's rounds, normalised on the sphere."""

  def normalized(rows):
    return l2_normalize(rows) if sphere else rows

  def round_of_lloyd(_, rows_KC):
    codes_N = nearest_codes(latents_NC, rows_KC)
    sums_KC = jnp.zeros_like(rows_KC).at[codes_N].add(latents_NC)
    counts_K1 = jnp.zeros((size, 1)).at[codes_N].add(1.0)
    centres_KC = normalized(sums_KC / jnp.maximum(counts_K1, 1))
    return jnp.where(counts_K1 > 0, centres_KC, rows_KC)

  rows_KC = normalized(random_rows(latents_NC, size, key))
  return jax.lax.fori_loop(0, KMEANS_ROUNDS, round_of_lloyd, rows_KC)


def initial_rows(
  config: CodebookConfig, latents_NC: jax.Array, size: int, key: jax.Array, sphere: bool
) -> jax.Array:
  """Returns a codebook of the first batch's latents; `sphere`: of length 1."""
  if config.init == "kmeans":
    return kmeans_rows(latents_NC, size, key, sphere)
  rows_KC = random_rows(latents_NC, size, key)
  return l2_normalize(rows_KC) if sphere else rows_KC


def perturb(
  config: CodebookConfig,
  z_q: jax.Array,
  codebook_KC: jax.Array,
  step: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Returns rows [B, h, w, C] of which some are replaced by rows near them.

  Gradients pass to `z_q` as if nothing was replaced.

  Args:
    config: how many of them.
    z_q: rows of the codebook, straight-through to the encoder.
    codebook_KC: as it was compared with the latents: normalised on the sphere.
    step: of the training.
    key: of the random choice.
  """
  c, stop = config, jax.lax.stop_gradient
  first, last = c.perturbation_steps
  progress = jnp.clip((step - first) / max(1, last - first), 0.0, 1.0)
  share = c.perturbed_codes[0] + progress * (
    c.perturbed_codes[1] - c.perturbed_codes[0]
  )
  image_key, code_key, row_key = jax.random.split(key, 3)
  B, h, w, C = z_q.shape
  chosen_B = jax.random.bernoulli(image_key, c.perturbed_images, (B, 1, 1))
  chosen_Bhw = chosen_B & jax.random.bernoulli(code_key, share, (B, h, w))
  rows_KC = stop(codebook_KC)
  distances_NK = squared_distances(stop(z_q).reshape(-1, C), rows_KC)
  near = min(c.perturbation_rows, len(rows_KC))
  _, nearest_NR = jax.lax.top_k(-distances_NK, near)
  picked_N1 = jax.random.randint(row_key, (B * h * w, 1), 0, near)
  codes_N = jnp.take_along_axis(nearest_NR, picked_N1, axis=1)[:, 0]
  others = rows_KC[codes_N].reshape(z_q.shape)
  return z_q + jnp.where(chosen_Bhw[..., None], stop(others - z_q), 0.0)


def replace_codebook(tree: Any, dead_K1: jax.Array, rows_KC: jax.Array | float) -> Any:
  """Returns the tree (parameters, moments) with the codebook's dead rows replaced."""

  def replaced(path, leaf):
    is_codebook = getattr(path[-1], "key", None) == "codebook" if path else False
    return jnp.where(dead_K1, rows_KC, leaf) if is_codebook else leaf

  return jax.tree_util.tree_map_with_path(replaced, tree)
