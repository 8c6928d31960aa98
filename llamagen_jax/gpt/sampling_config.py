"""How codes are drawn from logits: one frozen dataclass, stored in bundles."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from llamagen_jax.errors import UserError

SCHEDULES = ("constant", "linear", "power-cosine")


class BatchSampling(NamedTuple):
  """Sampling settings as arrays [B]: every image of a batch has its own."""

  guidance_scale: jax.Array
  guidance_schedule: jax.Array  # index into SCHEDULES
  guidance_power: jax.Array
  guidance_stop: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  greedy: jax.Array


class ActiveFilters(NamedTuple):
  """The stages of sampling that some row of a batch needs; decides the program."""

  guidance: bool
  top_k: bool
  top_p: bool
  draw: bool


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """Settings of one image; the order of the stages is that of the fields."""

  guidance_scale: float = 1.0  # 1 = no guidance
  guidance_schedule: str = "constant"  # constant | linear | power-cosine
  guidance_power: float = 2.75  # of the power-cosine schedule
  guidance_stop: int = -1  # >= 0: no guidance after this decode step
  temperature: float = 1.0
  top_k: int = 0  # 0 = off
  top_p: float = 1.0  # 1 = off
  greedy: bool = False  # the most probable code, whatever the settings above

  def __post_init__(self):
    _check("guidance_scale", self.guidance_scale, self.guidance_scale >= 1, ">= 1")
    _check("guidance_power", self.guidance_power, self.guidance_power > 0, "> 0")
    _check("guidance_stop", self.guidance_stop, self.guidance_stop >= -1, ">= -1")
    _check("temperature", self.temperature, self.temperature > 0, "> 0")
    _check("top_k", self.top_k, self.top_k >= 0, ">= 0")
    _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
    _check(
      "guidance_schedule",
      self.guidance_schedule,
      self.guidance_schedule in SCHEDULES,
      f"one of {', '.join(SCHEDULES)}",
    )

  def rows(self, batch: int) -> BatchSampling:
    """These settings for every image of a batch, as host arrays."""
    values = dataclasses.asdict(self)
    values["guidance_schedule"] = SCHEDULES.index(self.guidance_schedule)
    return BatchSampling(**{k: np.full(batch, v, DTYPES[k]) for k, v in values.items()})

  @property
  def stages(self) -> ActiveFilters:
    return ActiveFilters(
      guidance=self.guidance_scale > 1,
      top_k=self.top_k > 0,
      top_p=self.top_p < 1,
      draw=not self.greedy,
    )


DTYPES = {
  field.name: {float: np.float32, int: np.int32, str: np.int32, bool: np.bool_}[
    field.type
  ]
  for field in dataclasses.fields(SamplingConfig)
}


def _check(name: str, value, ok: bool, expected: str) -> None:
  if not ok:
    raise UserError(f"{name}={value}: expected {expected}")
