"""Images of a run while it trains: always the same classes or prompts and seeds."""

import dataclasses

import jax
import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.images import grid
from llamagen_jax.sampling.sample import sample
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.weights import bundle

COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
  """The images that every evaluation samples from the averaged weights."""

  tokenizer: str = ""  # bundle that turns codes into images; "" = no grid
  count: int = 16  # images, of classes spread over all
  prompts: tuple[str, ...] = ()  # of a model of captions; needs data.t5
  seed: int = 0
  scored: int = 0  # samples besides, of random classes, to log the IS of; 0 = none
  inception: str = ""  # weights for it, as of `evaluate --inception`
  reference: str = ""  # npz or folder of real images, to log the samples' precision

  def __post_init__(self):
    object.__setattr__(self, "prompts", tuple(self.prompts))
    if self.count < 1:
      raise UserError(f"images.count={self.count}: expected at least 1")
    if self.scored < 0:
      raise UserError(f"images.scored={self.scored}: expected 0 or more")
    if self.scored and not (self.tokenizer and self.inception):
      raise UserError(
        f"images.scored={self.scored}: expected images.tokenizer and images.inception,"
        f" found {self.tokenizer!r} and {self.inception!r}"
      )
    if self.reference and not self.scored:
      raise UserError(
        f"images.reference={self.reference}: expected images.scored > 0, found 0"
      )


class SampleGrid:
  """Samples the grid of a run; loads the tokenizer once."""

  def __init__(self, config: ImagesConfig, identity: str, condition: str, t5: str):
    """Checks before the run what its first evaluation needs.

    Args:
      identity: of the tokenizer whose codes the run learns.
      condition: of the model, "class" or "caption".
      t5: the folder of its text encoder, "" where features are stored.

    Raises:
      UserError: there is no such tokenizer, it is another one, or captions cannot be
        encoded.
    """
    self._config = config
    self._tokenizer: bundle.Tokenizer | None = None
    if not config.tokenizer:
      return
    _, found = bundle.read_tokenizer_config(config.tokenizer)
    if found != identity:
      raise UserError(
        f"images.tokenizer={config.tokenizer}: tokenizer {found[:12]}, the codes are of"
        f" {identity[:12]}"
      )
    if condition == "caption" and not (t5 and config.prompts):
      raise UserError(
        f"images.tokenizer={config.tokenizer}: a model of captions needs data.t5 and"
        f" images.prompts for its images, found {t5!r} and {config.prompts}"
      )

  def tokenizer(self, mesh: jax.sharding.Mesh) -> bundle.Tokenizer:
    """Returns the config's tokenizer, on the mesh."""
    if self._tokenizer is None:
      self._tokenizer = bundle.load_tokenizer(self._config.tokenizer, mesh)
    return self._tokenizer

  def __call__(
    self,
    gpt: bundle.Transformer,
    mesh: jax.sharding.Mesh,
    text_encoder: TextEncoder | None = None,
  ) -> dict[str, np.ndarray]:
    """Returns {"samples": uint8 [H, W, 3]}, a grid of images."""
    c = self._config
    if gpt.config.condition == "class":
      classes = gpt.config.num_classes
      asked = {"classes": [i * classes // c.count for i in range(c.count)]}
    else:
      asked = {"prompts": c.prompts, "text_encoder": text_encoder}
    images = sample(gpt, self.tokenizer(mesh), **asked, seed=c.seed)
    sheet = grid(images, columns=min(COLUMNS, len(images)))
    return {"samples": np.asarray(sheet)}
