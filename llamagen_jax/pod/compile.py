"""`llamagen compile-for-pod`: what a config does on a pod, before paying for one.

The real train step is compiled for a topology of TPU chips that nobody here holds,
and the compiled program says how much memory a chip needs, what it computes, moves
and exchanges. Needs the `libtpu` wheel and no TPU.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json

from absl import flags
import jax
import jax.numpy as jnp

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.train import GPTRecipe, init_state, train_step
from llamagen_jax.pod import hlo, topology
from llamagen_jax.pod.chips import Chip
from llamagen_jax.pod.flops import train_flops
from llamagen_jax.training.mesh import batch_sharding, replicated
from llamagen_jax.training.recipe import build, parse_config
from llamagen_jax.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a chip of the pod does in one train step."""

  chip: Chip
  chips: int
  steps: int
  model_flops: float  # of the step, on one chip
  found: hlo.Analysis

  @property
  def fits(self) -> bool:
    return self.found.memory.total <= self.chip.hbm_bytes

  @property
  def seconds(self) -> dict[str, float]:
    """Least time of a step by resource; exchanges in one ring, both directions."""
    sent = sum(c.sent for c in self.found.collectives)
    return {
      "compute": self.found.flops / self.chip.peak_flops,
      "HBM": self.found.bytes / self.chip.hbm_bandwidth,
      "ICI": sent / (2 * self.chip.link_bandwidth),
    }

  @property
  def binding(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  @property
  def mfu(self) -> float:
    """Model FLOP/s utilisation if the binding resource were used to the full."""
    return self.model_flops / self.chip.peak_flops / self.seconds[self.binding]

  @property
  def chip_hours(self) -> float:
    return self.seconds[self.binding] * self.steps * self.chips / 3600


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string(
    "topology", None, "Chips to compile for: v5e:2x4, v5p:4x4x4 ..", flag_values=values
  )
  flags.DEFINE_string("json", "", "File for the figures, too.", flag_values=values)
  config = parse_config("compile-for-pod", argv, values, required=("topology",))
  with topology.quiet():
    verdict = compile_train_step(build(GPTRecipe, config), values.topology)
  print(describe(verdict))
  if values.json:
    with open(values.json, "w") as file:
      json.dump(figures(verdict), file, indent=1)


def compile_train_step(recipe: GPTRecipe, where: str) -> Verdict:
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
    compiled = _compiled(step.lower(state, rows))
  flops = train_flops(recipe.model, batch_size) / mesh.size
  return Verdict(
    topology.chip(mesh), mesh.size, recipe.run.steps, flops, _analysed(compiled)
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


def _compiled(lowered):
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    # The compiler gives up where no schedule fits a chip's memory.
    lines = [line for line in str(error).splitlines() if line.strip()]
    raise UserError(f"the compiler refuses: {' '.join(lines[:2])}") from error


def _analysed(compiled) -> hlo.Analysis:
  try:
    return hlo.analyse(compiled)
  except jax.errors.JaxRuntimeError as error:
    m = compiled.memory_analysis()
    used = (m.argument_size_in_bytes + m.temp_size_in_bytes) / 2**30
    reason = " ".join(str(error).split())[:120]
    raise UserError(
      f"it compiles, with {used:.2f} GiB a chip, but this jaxlib cannot read what"
      f" libtpu wrote: {reason}"
    ) from error


def describe(v: Verdict) -> str:
  """The verdict in lines for the user."""
  m, gib = v.found.memory, 2**30
  over = (m.total - v.chip.hbm_bytes) / gib
  lines = [
    f"{v.chips} x {v.chip.name}",
    f"HBM a chip      arguments {m.arguments / gib:.2f}, temporaries"
    f" {m.temporaries / gib:.2f}, total {m.total / gib:.2f} of"
    f" {v.chip.hbm_bytes / gib:.0f} GiB: {'fits' if v.fits else f'over by {over:.2f}'}",
    f"FLOPs a chip    {v.found.flops:.3g}, {v.found.flops / v.model_flops:.2f} x"
    f" the model's {v.model_flops:.3g}",
    f"bytes a chip    {v.found.bytes / 1e9:.2f} GB",
  ]
  for c in v.found.collectives:
    lines.append(
      f"  {c.kind:20} {c.count:5} among {c.group}: {c.sent / 1e6:.1f} MB sent,"
      f" the largest of {c.largest / 1e6:.1f} MB"
    )
  times = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in v.seconds.items())
  lines += [
    f"least ms a step {times}: {v.binding} binds",
    f"at best         MFU {v.mfu:.0%}, {v.chip_hours:,.0f} chip-hours,"
    f" {v.chip_hours / v.chips:.1f} hours for {v.steps} steps",
  ]
  return "\n".join(lines)


def figures(v: Verdict) -> dict:
  """The verdict as numbers."""
  return {
    "chip": v.chip.name,
    "chips": v.chips,
    "fits": v.fits,
    "memory": dataclasses.asdict(v.found.memory),
    "flops": v.found.flops,
    "model_flops": v.model_flops,
    "bytes": v.found.bytes,
    "collectives": [
      dataclasses.asdict(c) | {"sent": c.sent} for c in v.found.collectives
    ],
    "seconds": v.seconds,
    "mfu": v.mfu,
    "chip_hours": v.chip_hours,
  }
