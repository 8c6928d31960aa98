"""The transformer's train step, compiled for a pod."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.train import GPTRecipe, init_state, train_step
from llamagen_jax.pod import topology
from llamagen_jax.pod.flops import train_flops
from llamagen_jax.pod.verdict import Verdict, analysed
from llamagen_jax.training.mesh import batch_sharding, replicated
from llamagen_jax.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class TrainVerdict(Verdict):
  """One update, and all updates of the config."""

  steps: int

  @property
  def chip_hours(self) -> float:
    return self.least_seconds * self.steps * self.chips / 3600

  def lines(self) -> list[str]:
    return [
      *super().lines(),
      f"at best         MFU {self.mfu:.0%}, {self.chip_hours:,.0f} chip-hours,"
      f" {self.chip_hours / self.chips:.1f} hours for {self.steps} steps",
    ]

  def figures(self) -> dict[str, Any]:
    return super().figures() | {"steps": self.steps, "chip_hours": self.chip_hours}


def compile_train_step(recipe: GPTRecipe, where: str) -> TrainVerdict:
  """Compiles the step that `train-gpt` runs for a topology, `v5e:2x4` say.

  Raises:
    UserError: an unknown topology, a mesh that is not its size, a batch that the
      mesh does not divide, or a program that the compiler cannot place.
  """
  m, batch_size = recipe.mesh, recipe.data.batch_size
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
      functools.partial(train_step, recipe),
      donate_argnums=0,
      out_shardings=(places, replicated(mesh)),
    )
    rows = abstract_batch(recipe.model, batch_size, batch_sharding(mesh))
    found = analysed(step.lower(state, rows))
  flops = train_flops(recipe.model, batch_size) / mesh.size
  return TrainVerdict(topology.chip(mesh), mesh.size, flops, found, recipe.run.steps)


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
