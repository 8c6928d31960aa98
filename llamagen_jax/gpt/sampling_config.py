"""How codes are sampled from logits: one frozen dataclass.

Bundles store it, so it stands below `weights`; `sampling` carries it out.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.options import option

# Courses of the guidance scale over an image; formulas in sampling/guidance.py.
GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")
# Orders of drawing codes; all but raster need a model trained in random orders.
ORDERS = ("raster", "random", "known-first")
LARGEST = 2**31 - 1  # of integer settings, which devices keep as int32


class BatchSampling(NamedTuple):
  """Sampling settings as arrays [B]: every image of a batch has its own."""

  guidance_scale: jax.Array
  guidance_schedule: jax.Array  # index into GUIDANCE_SCHEDULES
  guidance_power: jax.Array
  guidance_start: jax.Array
  guidance_stop: jax.Array
  guidance_beta: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  greedy: jax.Array


class ActiveFilters(NamedTuple):
  """The stages of sampling that some row of a batch needs; decides the program."""

  guidance: bool
  top_k: bool
  top_p: bool
  random: bool


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """Settings of one image; the stages of sampling follow the order of the fields.

  Every field is a flag of `llamagen sample`, explained in docs/sampling.md.
  """

  guidance_scale: float = option("strength of classifier-free guidance; 1 = off", 1.0)
  guidance_schedule: str = option(
    "course of the guidance scale over the codes of an image; formulas in"
    " docs/sampling.md",
    "constant",
    choices=GUIDANCE_SCHEDULES,
  )
  guidance_power: float = option("exponent of the power-cosine schedule", 2.75)
  guidance_start: int = option(
    "no guidance for that many codes at the start of an image", 0, unit="CODES"
  )
  guidance_stop: int = option(
    "no guidance after this decode step (step n samples code n + 1); -1 = never stop",
    -1,
    unit="STEP",
  )
  guidance_beta: float = option(
    "strength of a model trained without guidance, about 1 / guidance scale", 1.0
  )
  temperature: float = option("logits are divided by it", 1.0)
  top_k: int = option("sample from the k most probable codes; 0 = off", 0, unit="K")
  top_p: float = option(
    "sample from the most probable codes of this total probability; 1 = off", 1.0,
    unit="P",
  )  # fmt: skip
  greedy: bool = option("take the most probable code, always", False)
  window: int = option(
    "codes that a forward reads; more need fewer forwards for the same codes, up to"
    " rounding", 1, unit="CODES",
  )  # fmt: skip
  order: str = option(
    "in which codes are drawn: raster; random, by the seed; or known-first, those that"
    " `edit` keeps before the others. All but raster need a model that was trained in"
    " random orders to the end", "raster", choices=ORDERS,
  )  # fmt: skip

  def __post_init__(self):
    scale, power = self.guidance_scale, self.guidance_power
    _check("guidance_scale", scale, 1 <= scale < math.inf, "a number >= 1 (1 = off)")
    _check("guidance_power", power, 0 < power < math.inf, "a number > 0")
    start, stop = self.guidance_start, self.guidance_stop
    _check("guidance_start", start, 0 <= start <= LARGEST, f"0 .. {LARGEST}")
    _check("guidance_stop", stop, -1 <= stop <= LARGEST, f"-1 .. {LARGEST}")
    beta = self.guidance_beta
    _check("guidance_beta", beta, 0 < beta <= 1, "in (0, 1]")
    warm = 0 < self.temperature < math.inf
    _check("temperature", self.temperature, warm, "a number > 0, or greedy")
    _check("top_k", self.top_k, 0 <= self.top_k <= LARGEST, f"0 .. {LARGEST}")
    _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
    _check("window", self.window, 1 <= self.window <= LARGEST, "1 or more")
    schedule, known = self.guidance_schedule, ", ".join(GUIDANCE_SCHEDULES)
    _check(
      "guidance_schedule", schedule, schedule in GUIDANCE_SCHEDULES, f"one of {known}"
    )
    _check("order", self.order, self.order in ORDERS, f"one of {', '.join(ORDERS)}")

  def check_model(self, config: GPTConfig) -> None:
    """Refuses settings that a model cannot follow.

    Raises:
      UserError: guidance_beta or order for a model without the embedding of it.
    """
    if self.order != "raster" and not config.target_embedding:
      raise UserError(
        f"order={self.order}: the model learned raster order only; expected"
        " --order=raster"
      )
    if self.guidance_beta != 1 and not config.guidance_embedding:
      raise UserError(
        f"guidance_beta={self.guidance_beta}: the model was not trained without"
        " guidance (GFT); set guidance_scale instead"
      )

  @classmethod
  def read(cls, fields: Mapping[str, Any], where: str) -> "SamplingConfig":
    """Returns settings that a file holds.

    Raises:
      UserError: a setting that is unknown or refused, beginning with `where`.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise UserError(f"{where}: written by another version, has {sorted(unknown)}")
    try:
      return cls(**fields)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error

  def for_batch(self, batch: int) -> BatchSampling:
    """Returns these settings for every image of a batch, as host arrays [B]."""
    values = {name: getattr(self, name) for name in BatchSampling._fields}
    values["guidance_schedule"] = GUIDANCE_SCHEDULES.index(self.guidance_schedule)
    return BatchSampling(**{k: np.full(batch, v, DTYPES[k]) for k, v in values.items()})

  @property
  def active_filters(self) -> ActiveFilters:
    return ActiveFilters(
      guidance=self.guidance_scale > 1,
      top_k=self.top_k > 0,
      top_p=self.top_p < 1,
      random=not self.greedy,
    )


DTYPES = {
  field.name: {float: np.float32, int: np.int32, str: np.int32, bool: np.bool_}[
    field.type
  ]
  for field in dataclasses.fields(SamplingConfig)
}


def _check(name: str, value: Any, ok: bool, expected: str) -> None:
  if not ok:
    raise UserError(f"{name}={value}: expected {expected}")
