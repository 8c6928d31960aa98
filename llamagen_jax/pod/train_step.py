"""The transformer's train step, compiled for a pod.

With captions a T5 may run along: a program of its own, right before every step, whose
weights stay on the chips.
"""

import functools

from absl import logging
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import t5_flops
from llamagen_jax.gpt.objective import ObjectivePhase
from llamagen_jax.parallel.mesh import batch_sharding, replicated
from llamagen_jax.pod import topology
from llamagen_jax.pod.compiler import analysed
from llamagen_jax.pod.report import GIB, CompileReport
from llamagen_jax.text.t5 import T5Config, init_t5, padded_features
from llamagen_jax.training.gpt_step import GPTRecipe, init_state, train_step, work
from llamagen_jax.training.state import abstract_state


def compile_train_step(
  recipe: GPTRecipe,
  where: str,
  encoder: T5Config | None = None,
  step_number: int | None = None,
  quick: bool = False,
) -> CompileReport:
  """Compiles the step that `train-gpt` runs for a topology such as `v5e:2x4`.

  Args:
    recipe: the config.
    where: the topology.
    encoder: shape of the T5 that runs along, if one does.
    step_number: of the run, for recipes whose phases have steps of their own;
      None = the last one.
    quick: stop before machine code is made.

  Raises:
    UserError: an unknown topology, a mesh that is not its size, a batch that the
      mesh does not divide, an encoder whose features the model does not take, a step
      beyond the run, or a program that does not fit into a chip's memory.
  """
  m, batch_size = recipe.mesh, recipe.data.batch_size
  phase, steps = _phase_of(recipe, step_number)
  if encoder:
    _check_encoder(encoder, recipe.model)
  mesh = topology.mesh(where, m.data, m.fsdp, m.tensor)
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % shards:
    raise UserError(
      f"data.batch_size={batch_size} is not a multiple of the mesh's data x fsdp ="
      f" {shards}"
    )
  with jax.set_mesh(mesh):
    logging.info("tracing the train step")
    state = abstract_state(functools.partial(init_state, recipe), mesh)
    step = jax.jit(
      functools.partial(train_step, recipe, phase=phase),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    batch = abstract_batch(recipe.model, batch_size, batch_sharding(mesh))
    analysis = analysed(step.lower(state, batch), quick)
    before = compile_encoder(encoder, recipe, mesh, quick) if encoder else None
  flops = work(recipe, phase.patch).flops / mesh.size
  report = CompileReport(
    topology.chip(mesh), mesh.size, topology.num_slices(mesh), flops, analysis, before
  )
  return _with_hours(report, recipe, phase, steps)


def _phase_of(recipe: GPTRecipe, step: int | None) -> tuple[ObjectivePhase, range]:
  """Returns the phase that a step of the run belongs to, and all steps of it."""
  total, phases = recipe.run.steps, recipe.objective.phases()
  step = total - 1 if step is None else step
  if step >= total:
    raise UserError(f"--step={step}: expected a step below run.steps={total}")
  start = max(s for s in phases if s <= step)
  end = min((s for s in phases if s > step), default=total)
  return phases[start], range(start, min(end, total))


def _with_hours(
  report: CompileReport, recipe: GPTRecipe, phase: ObjectivePhase, numbers: range
) -> CompileReport:
  """Adds the time that all steps of a phase take."""
  seconds, steps = report.least_seconds, len(numbers)
  hours = seconds * steps * report.chips / 3600
  rows = []
  if steps < recipe.run.steps:
    rows.append(
      ("phase", f"{phase}; steps {numbers[0]} .. {numbers[-1]} of {recipe.run.steps}")
    )
  if report.before:
    a = report.before.analysis
    rows += [
      (
        "T5 before it",
        f"weights {a.memory.arguments / GIB:.2f} GiB, in the total; temporaries"
        f" {a.memory.temporaries / GIB:.2f}; {a.flops:.3g} FLOPs,"
        f" {a.bytes / 1e9:.2f} GB",
      ),
      ("  least ms", report.before.times),
    ]
  best = (
    f"{1e3 * seconds:.1f} ms a step, MFU {report.mfu:.0%}, {hours:,.0f} chip-hours,"
    f" {hours / report.chips:.1f} hours for {steps} steps"
  )
  return report.with_more(
    [*rows, ("at best", best)], {"steps": steps, "chip_hours": hours}
  )


def compile_encoder(
  config: T5Config, recipe: GPTRecipe, mesh: jax.sharding.Mesh, quick: bool
) -> CompileReport:
  """Compiles the T5 over a batch's tokens; run under `jax.set_mesh`."""
  c, batch_size = recipe.model, recipe.data.batch_size
  params = abstract_state(functools.partial(init_t5, config), mesh)
  ids = jax.ShapeDtypeStruct(
    (batch_size, c.caption_tokens), jnp.int32, sharding=batch_sharding(mesh)
  )
  logging.info("tracing the T5")
  analysis = analysed(padded_features.lower(config, params, ids, ids), quick)
  flops = t5_flops(config, batch_size, c.caption_tokens) / mesh.size
  slices = topology.num_slices(mesh)
  return CompileReport(topology.chip(mesh), mesh.size, slices, flops, analysis)


def _check_encoder(encoder: T5Config, model: GPTConfig) -> None:
  if model.condition != "caption" or model.caption_dim != encoder.dim:
    raise UserError(
      f"with a T5 of width {encoder.dim} expected model.condition=caption and"
      f" model.caption_dim={encoder.dim}, found {model.condition} and"
      f" {model.caption_dim}"
    )


def abstract_batch(config: GPTConfig, batch_size: int, sharding: jax.NamedSharding):
  """Returns the shapes of a batch as `train_step` takes it."""
  c = config

  def rows(dtype, *shape):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

  codes = {"codes": rows(jnp.int32, c.image_tokens)}
  if c.condition == "class":
    return codes | {"label": rows(jnp.int32)}
  return codes | {
    "features": rows(jnp.bfloat16, c.caption_tokens, c.caption_dim),
    "mask": rows(jnp.int32, c.caption_tokens),
    "valid": rows(jnp.float32),
  }
