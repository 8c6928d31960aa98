"""One image to draw, as the API hands it to the engine."""

import dataclasses
from typing import Any

import jax
import numpy as np

from llamagen_jax.gpt.sampling_config import SamplingConfig


@dataclasses.dataclass(eq=False)
class Request:
  """One image to draw, and its codes as they come."""

  condition: Any  # a label, or caption features [P, C]
  key: jax.Array  # image i of `sample(seed)` has fold_in(key(seed), i)
  sampling: SamplingConfig = SamplingConfig()
  condition_mask: np.ndarray | None = None  # [P], 0 on the padding of a caption
  codes: list[int] = dataclasses.field(default_factory=list)

  @property
  def guided(self) -> bool:
    return self.sampling.guidance_scale > 1
