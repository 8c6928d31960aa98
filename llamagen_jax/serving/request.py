"""One image to generate, as the API hands it to the engine."""

import dataclasses
from typing import Any

import numpy as np

from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.sampling.edit import Canvas


@dataclasses.dataclass(eq=False)
class Request:
  """One image to generate, and its codes as they come."""

  condition: Any  # a label, or caption features [P, C]
  key: np.ndarray  # data of a key, uint32 [2]; image i of a seed: fold_in(key(seed), i)
  sampling: SamplingConfig = SamplingConfig()
  condition_mask: np.ndarray | None = None  # [P], 0 on the padding of a caption
  negative: np.ndarray | None = None  # features [P, C] that guidance leads away from
  negative_mask: np.ndarray | None = None  # [P]
  # Of an edit.
  canvas: Canvas | None = None  # its image, and where that is hidden
  known: np.ndarray | None = None  # codes of the image, int32 [T]
  is_known: np.ndarray | None = None  # which of them stay, bool [T]
  feather: int = 1  # pixels beside the mask in which drawn and own ones mix
  # As they come.
  codes: list[int] = dataclasses.field(default_factory=list)
  forwards: int = 0  # that these codes took; fewer than codes with a window

  @property
  def guided(self) -> bool:
    return self.sampling.active_filters.guidance

  def finish(self, image: np.ndarray) -> np.ndarray:
    """Returns the image of all codes, uint8 [H, W, 3], with an edit's own pixels."""
    if self.canvas is None:
      return image
    return self.canvas.put_back(image[None], self.feather)[0]
