"""Starting a training state's codebook from data, and replacing its dead rows."""

import jax
import jax.numpy as jnp

from llamagen_jax.tokenizer import codebook
from llamagen_jax.tokenizer.model import VQModel
from llamagen_jax.tokenizer.quantizer import l2_normalize
from llamagen_jax.training.state import TrainState
from llamagen_jax.training.tokenizer_state import TokenizerState


def start_codebook(recipe, state: TokenizerState, images, key) -> TokenizerState:
  """Returns the state with a codebook of the first batch's latents at step 0."""
  r = recipe
  if r.codebook.init == "uniform" or r.init.source:
    return state

  def started(params):
    z = VQModel(r.model).apply({"params": params}, images, method="latents")
    z = z.reshape(-1, r.model.codebook_dim)
    if r.model.l2_norm:
      z = l2_normalize(z)
    size, sphere = r.model.codebook_size, r.model.l2_norm
    rows_KC = codebook.initial_rows(r.codebook, z, size, key, sphere)
    return params | {"codebook": rows_KC}

  generator = state.generator
  params = jax.lax.cond(state.step == 0, started, lambda p: p, generator.params)
  return state.replace(generator=generator.replace(params=params))


def revive(recipe, generator: TrainState, latents_NC, counts_K, key) -> TrainState:
  """Replaces rows that the window lacks by latents, every `restart_every` steps."""
  r = recipe

  def revived(generator):
    size = r.model.codebook_size
    rows_KC = codebook.random_rows(latents_NC, size, key)
    if r.model.l2_norm:
      rows_KC = l2_normalize(rows_KC)
    dead_K1 = (counts_K == 0)[:, None]
    return generator.replace(
      params=codebook.replace_codebook(generator.params, dead_K1, rows_KC),
      opt_state=codebook.replace_codebook(generator.opt_state, dead_K1, 0.0),
      ema=codebook.replace_codebook(generator.ema, dead_K1, rows_KC),
    )

  due = generator.step % r.codebook.restart_every == 0
  due &= jnp.all(jnp.isfinite(latents_NC))  # a step that is skipped may have others
  return jax.lax.cond(due, revived, lambda g: g, generator)
