"""Which mesh, recomputation and batch a transformer trains cheapest with on a pod."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import TextIO

import tqdm

from llamagen_jax.errors import UserError
from llamagen_jax.pod.report import GIB, CompileReport
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import MeshConfig

REMATS = ("none", "dots", "full")
TENSORS = (1, 2, 4, 8)  # chips that share a layer; more than 8 never paid


@dataclasses.dataclass(frozen=True)
class Trial:
  """A recipe that was tried, and the compiler's answer."""

  recipe: GPTRecipe
  report: CompileReport | None
  refusal: str = ""  # why there is no report

  @property
  def chip_seconds(self) -> float:
    """Least chip-seconds an image; infinite if it does not fit."""
    report = self.report
    if report is None or not report.fits:
      return float("inf")
    return report.least_seconds * report.chips / self.recipe.data.batch_size

  def line(self) -> str:
    """Returns the trial as a row under `HEADER`."""
    recipe, report = self.recipe, self.report
    m = recipe.mesh
    tried = (
      f"{m.data:5} {m.fsdp:5} {m.tensor:6}  {recipe.model.remat:5}"
      f" {recipe.data.batch_size:6}"
    )
    if report is None:
      return f"{tried}  {self.refusal}"
    memory = report.hbm / GIB
    if not report.fits:
      over = memory - report.chip.hbm_bytes / GIB
      return f"{tried} {memory:6.1f}  over by {over:.1f} GiB"
    return (
      f"{tried} {memory:6.1f} {1e3 * report.least_seconds:8.1f} {report.bottleneck:8}"
      f"{report.mfu:4.0%} {1e3 * self.chip_seconds:8.2f}"
    )


HEADER = (
  " data  fsdp tensor  remat  batch    GiB  least ms bottleneck  MFU  chip-ms/image"
)


def search(
  recipe: GPTRecipe,
  chips: int,
  compile_one: Callable[[GPTRecipe], CompileReport],
  errors: TextIO,
) -> list[Trial]:
  """Tries the meshes first, then recomputation and batch on the best of them.

  One dimension after the other, because every trial is a compilation. A shape that
  does not fit with any mesh is tried with `full`.

  Args:
    recipe: a config whose mesh, `model.remat` and `data.batch_size` are replaced.
    chips: of the topology.
    compile_one: compiles a recipe's train step; raises UserError if it cannot.
    errors: stream of the progress bar.

  Returns:
    All trials, the cheapest an image first, those that do not fit last.
  """
  tried: dict[GPTRecipe, Trial] = {}
  bar = tqdm.tqdm(desc="compile", unit="program", file=errors, dynamic_ncols=True)

  def best(recipes) -> GPTRecipe:
    for r in recipes:
      if r not in tried:
        tried[r] = _try(r, compile_one)
        bar.update()
        bar.write(tried[r].line(), file=errors)
    if not tried:
      least = chips // max(t for t in TENSORS if chips % t == 0)
      raise UserError(
        f"data.batch_size={recipe.data.batch_size}: no mesh of {chips} chips divides"
        f" it; expected a multiple of {least}"
      )
    return min(tried.values(), key=lambda trial: trial.chip_seconds).recipe

  with bar:
    bar.write(HEADER, file=errors)
    cheapest = best(_meshes(recipe, chips))
    if tried[cheapest].chip_seconds == float("inf"):
      full = dataclasses.replace(recipe.model, remat="full")
      cheapest = best(_meshes(dataclasses.replace(recipe, model=full), chips))
    cheapest = best(
      dataclasses.replace(
        cheapest, model=dataclasses.replace(cheapest.model, remat=remat)
      )
      for remat in REMATS
    )
    best(
      dataclasses.replace(
        cheapest, data=dataclasses.replace(cheapest.data, batch_size=size)
      )
      for size in (2 * cheapest.data.batch_size, 4 * cheapest.data.batch_size)
    )
  return sorted(tried.values(), key=lambda trial: trial.chip_seconds)


def _meshes(recipe: GPTRecipe, chips: int) -> Iterator[GPTRecipe]:
  """Yields meshes: weights whole on a chip, over all chips, over about their root."""
  for tensor in TENSORS:
    if chips % tensor:
      continue
    rest = chips // tensor
    halfway = max(f for f in range(1, int(rest**0.5) + 1) if rest % f == 0)
    for fsdp in sorted({1, halfway, rest}):
      if recipe.data.batch_size % rest == 0:  # data x fsdp
        mesh = MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor)
        yield dataclasses.replace(recipe, mesh=mesh)


def _try(recipe: GPTRecipe, compile_one: Callable[[GPTRecipe], CompileReport]) -> Trial:
  try:
    return Trial(recipe, compile_one(recipe))
  except UserError as refused:
    return Trial(recipe, None, str(refused))
