"""The transformer's train step, compiled for a pod.

With captions a T5 may run along: a program of its own, right before every step, whose
weights stay on the chips.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import t5_flops
from llamagen_jax.gpt.objective import ObjectivePhase
from llamagen_jax.parallel.mesh import batch_sharding, replicated
from llamagen_jax.pod import topology
from llamagen_jax.pod.report import GIB, CompileReport, analysed
from llamagen_jax.text.t5 import T5Config, init_t5, padded_features
from llamagen_jax.training.gpt_step import GPTRecipe, init_state, train_step, work
from llamagen_jax.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class TrainReport(CompileReport):
  """One update, and all updates of the config."""

  steps: int
  encoder: CompileReport | None = None  # of the T5 that runs along

  @property
  def hbm(self) -> int:
    if self.encoder is None:
      return super().hbm
    step, encoder = self.found.memory, self.encoder.found.memory
    return max(step.total + encoder.arguments, encoder.total + step.arguments)

  @property
  def least_seconds(self) -> float:
    encoder = self.encoder.least_seconds if self.encoder else 0.0
    return super().least_seconds + encoder

  @property
  def chip_hours(self) -> float:
    return self.least_seconds * self.steps * self.chips / 3600

  def lines(self) -> list[str]:
    return [
      *super().lines(),
      *(self._encoder_lines() if self.encoder else ()),
      f"at best         {1e3 * self.least_seconds:.1f} ms a step, MFU {self.mfu:.0%},"
      f" {self.chip_hours:,.0f} chip-hours, {self.chip_hours / self.chips:.1f} hours"
      f" for {self.steps} steps",
    ]

  def _encoder_lines(self) -> list[str]:
    e = self.encoder
    m = e.found.memory
    return [
      f"T5 before it    weights {m.arguments / GIB:.2f} GiB, in the total; temporaries"
      f" {m.temporaries / GIB:.2f}; {e.found.flops:.3g} FLOPs,"
      f" {e.found.bytes / 1e9:.2f} GB",
      f"  least ms      {e.times}",
    ]

  def figures(self) -> dict[str, Any]:
    return super().figures() | {
      "steps": self.steps,
      "least_seconds": self.least_seconds,
      "chip_hours": self.chip_hours,
      "encoder": self.encoder.figures() if self.encoder else None,
    }


def compile_train_step(
  recipe: GPTRecipe,
  where: str,
  encoder: T5Config | None = None,
  phase: ObjectivePhase | None = None,
) -> TrainReport:
  """Compiles the step that `train-gpt` runs for a topology, `v5e:2x4` say.

  Args:
    recipe: the config.
    where: the topology.
    encoder: shape of the T5 that runs along, if one does.
    phase: of the objective; None = the last one of the run.

  Raises:
    UserError: an unknown topology, a mesh that is not its size, a batch that the
      mesh does not divide, an encoder whose features the model does not take, or a
      program that the compiler cannot place.
  """
  m, batch_size = recipe.mesh, recipe.data.batch_size
  phase = phase or list(recipe.objective.phases().values())[-1]
  if encoder:
    _check_encoder(encoder, recipe.model)
  mesh = topology.mesh(where, m.data, m.fsdp, m.tensor)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % parts:
    raise UserError(
      f"data.batch_size={batch_size} is not a multiple of the mesh's data x fsdp ="
      f" {parts}"
    )
  with jax.set_mesh(mesh):
    state = abstract_state(functools.partial(init_state, recipe), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
      functools.partial(train_step, recipe, phase=phase),
      donate_argnums=0,
      out_shardings=(places, replicated(mesh)),
    )
    rows = abstract_batch(recipe.model, batch_size, batch_sharding(mesh))
    found = analysed(step.lower(state, rows))
    along = compile_encoder(encoder, recipe, mesh) if encoder else None
  flops = work(recipe, phase.patch).flops / mesh.size
  chip, steps = topology.chip(mesh), recipe.run.steps
  return TrainReport(chip, mesh.size, flops, found, steps, along)


def compile_encoder(
  config: T5Config, recipe: GPTRecipe, mesh: jax.sharding.Mesh
) -> CompileReport:
  """Compiles what makes features of a batch's tokens; run under `jax.set_mesh`."""
  c, batch_size = recipe.model, recipe.data.batch_size
  params = abstract_state(functools.partial(init_t5, config), mesh)
  ids = jax.ShapeDtypeStruct(
    (batch_size, c.caption_tokens), jnp.int32, sharding=batch_sharding(mesh)
  )
  found = analysed(padded_features.lower(config, params, ids, ids))
  flops = t5_flops(config, batch_size, c.caption_tokens) / mesh.size
  return CompileReport(topology.chip(mesh), mesh.size, flops, found)


def _check_encoder(encoder: T5Config, model: GPTConfig) -> None:
  if model.condition != "caption" or model.caption_dim != encoder.dim:
    raise UserError(
      f"with a T5 of width {encoder.dim} expected model.condition=caption and"
      f" model.caption_dim={encoder.dim}, found {model.condition} and"
      f" {model.caption_dim}"
    )


def abstract_batch(config: GPTConfig, batch_size: int, place: jax.NamedSharding):
  """Shapes of a batch as `train_step` takes it."""
  c = config

  def rows(dtype, *shape):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place)

  codes = {"codes": rows(jnp.int32, c.image_tokens)}
  if c.condition == "class":
    return codes | {"label": rows(jnp.int32)}
  return codes | {
    "features": rows(jnp.bfloat16, c.caption_tokens, c.caption_dim),
    "mask": rows(jnp.int32, c.caption_tokens),
    "valid": rows(jnp.float32),
  }
