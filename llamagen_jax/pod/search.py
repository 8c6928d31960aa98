"""Which mesh, recomputation and batch a transformer trains cheapest with on a pod."""

from collections.abc import Iterator
import dataclasses
from typing import TextIO

import tqdm

from llamagen_jax.errors import UserError
from llamagen_jax.pod import topology
from llamagen_jax.pod.report import GIB
from llamagen_jax.pod.train_step import TrainReport, compile_train_step
from llamagen_jax.text.t5 import T5Config
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import MeshConfig

REMATS = ("none", "dots", "full")
TENSORS = (1, 2, 4, 8)  # chips that share a layer; more than 8 never paid


@dataclasses.dataclass(frozen=True)
class Trial:
  """A recipe that was tried, and the compiler's answer."""

  recipe: GPTRecipe
  verdict: TrainReport | None
  refusal: str = ""  # why there is no verdict

  @property
  def chip_seconds(self) -> float:
    """Least chip-seconds an image; infinite if it does not fit."""
    v = self.verdict
    if v is None or not v.fits:
      return float("inf")
    return v.least_seconds * v.chips / self.recipe.data.batch_size

  def line(self) -> str:
    r, v = self.recipe, self.verdict
    m = r.mesh
    what = (
      f"{m.data:5} {m.fsdp:5} {m.tensor:6}  {r.model.remat:5} {r.data.batch_size:6}"
    )
    if v is None:
      return f"{what}  {self.refusal}"
    memory = v.hbm / GIB
    if not v.fits:
      return f"{what} {memory:6.1f}  over by {memory - v.chip.hbm_bytes / GIB:.1f} GiB"
    return (
      f"{what} {memory:6.1f} {1e3 * v.least_seconds:8.1f} {v.bottleneck:8}"
      f"{v.mfu:4.0%} {1e3 * self.chip_seconds:8.2f}"
    )


HEADER = (
  " data  fsdp tensor  remat  batch    GiB  least ms bottleneck  MFU  chip-ms/image"
)


def search(
  recipe: GPTRecipe, where: str, errors: TextIO, encoder: T5Config | None = None
) -> list[Trial]:
  """Tries the meshes first, then recomputation and batch on the best of them.

  One thing after the other, because every trial is a compilation: a few dozen
  seconds each. A shape that does not fit with any mesh is tried with `full`.

  Args:
    recipe: a config whose mesh, `model.remat` and `data.batch_size` are replaced.
    where: a topology, `v5p:4x4x4` say.
    errors: where the progress bar goes.
    encoder: shape of the T5 that runs along, if one does.

  Returns:
    All trials, the cheapest an image first, those that do not fit last.

  Raises:
    UserError: an unknown topology.
  """
  chips = len(topology.devices(where))
  tried: dict[GPTRecipe, Trial] = {}
  bar = tqdm.tqdm(desc="compile", unit="program", file=errors, dynamic_ncols=True)

  def best(recipes) -> GPTRecipe:
    for r in recipes:
      if r not in tried:
        tried[r] = _try(r, where, encoder)
        bar.update()
        bar.write(tried[r].line(), file=errors)
    return min(tried.values(), key=lambda trial: trial.chip_seconds).recipe

  with bar:
    bar.write(HEADER, file=errors)
    found = best(_meshes(recipe, chips))
    if tried[found].chip_seconds == float("inf"):
      full = dataclasses.replace(recipe.model, remat="full")
      found = best(_meshes(dataclasses.replace(recipe, model=full), chips))
    found = best(
      dataclasses.replace(found, model=dataclasses.replace(found.model, remat=remat))
      for remat in REMATS
    )
    best(
      dataclasses.replace(found, data=dataclasses.replace(found.data, batch_size=size))
      for size in (2 * found.data.batch_size, 4 * found.data.batch_size)
    )
  return sorted(tried.values(), key=lambda trial: trial.chip_seconds)


def _meshes(recipe: GPTRecipe, chips: int) -> Iterator[GPTRecipe]:
  """Weights whole on a chip, spread over all chips, and spread over about a root."""
  for tensor in TENSORS:
    if chips % tensor:
      continue
    rest = chips // tensor
    halfway = max(f for f in range(1, int(rest**0.5) + 1) if rest % f == 0)
    for fsdp in sorted({1, halfway, rest}):
      if recipe.data.batch_size % rest == 0:  # data x fsdp
        mesh = MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor)
        yield dataclasses.replace(recipe, mesh=mesh)


def _try(recipe: GPTRecipe, where: str, encoder: T5Config | None) -> Trial:
  try:
    return Trial(recipe, compile_train_step(recipe, where, encoder))
  except UserError as refused:
    return Trial(recipe, None, str(refused))
