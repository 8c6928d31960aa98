"""Bodies of requests and responses: OpenAI's images API, and this server's additions.

Fields that OpenAI documents and that change nothing here (quality, user, style, ...)
are read and checked.
"""

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES
from llamagen_jax.sampling.edit import EditSettings

LONGEST_PROMPT = 32_000  # characters, as OpenAI's
LONGEST_CLASS = 200
LARGEST_SEED = 2**64 - 1
RANDOM_SEED = -1
VARIATION = 0.5  # strength, where a request names none
GREEDY_TEMPERATURE = 1e-3  # below it the most probable code is taken

Seed = Annotated[int, Field(ge=RANDOM_SEED, le=LARGEST_SEED)]
ClassLabel = (
  Annotated[int, Field(ge=0, le=2**31 - 1)]
  | Annotated[str, Field(min_length=1, max_length=LONGEST_CLASS)]
)
Schedule = Literal[*GUIDANCE_SCHEDULES]
OutputFormat = Literal["png", "jpeg", "webp"]


class ImageRequest(BaseModel):
  """Body of POST /v1/images/generations."""

  model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
  needs_no_condition: ClassVar[bool] = False

  prompt: str | None = Field(
    None,
    max_length=LONGEST_PROMPT,
    description="A text; for a model of classes `class:207`, an index or a name.",
  )
  model: str | None = Field(None, description="One of /v1/models, or an alias.")
  n: int | None = Field(None, ge=1, description="Images of the prompt; default 1.")
  size: str | None = Field(
    None, description="WIDTHxHEIGHT or `auto`; /v1/models says what a model generates."
  )
  response_format: Literal["b64_json", "url"] | None = Field(
    None, description="Default: both."
  )
  output_format: OutputFormat | None = None
  output_compression: int | None = Field(
    None, ge=0, le=100, description="Quality of jpeg and webp; 100 is best."
  )
  stream: bool | None = None
  partial_images: int | None = Field(
    None, ge=0, le=3, description="Unfinished images sent along with `stream`."
  )
  # Checked and without effect.
  quality: (
    Literal["standard", "hd", "low", "medium", "high", "xhigh", "max", "auto"] | None
  ) = None
  background: Literal["opaque", "auto"] | None = Field(
    None, description="Images are opaque."
  )
  style: Literal["vivid", "natural"] | None = None
  moderation: Literal["low", "auto"] | None = None
  user: str | None = Field(None, max_length=512)
  safety_identifier: str | None = Field(None, max_length=512)
  # Ours.
  negative_prompt: str | None = Field(
    None,
    max_length=LONGEST_PROMPT,
    description="What guidance leads away from; for models of prompts.",
  )
  seed: Seed | None = Field(
    None, description="Same seed and settings, same images; -1 or none: a random one."
  )
  guidance_scale: float | None = Field(
    None, ge=0, le=1000, description="1 or less: no guidance."
  )
  guidance_schedule: Schedule | None = Field(
    None, description="Course of the guidance scale over the codes of an image."
  )
  temperature: float | None = Field(
    None, ge=0, le=1000, description="0: always the most probable code."
  )
  top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0: off.")
  top_p: float | None = Field(None, gt=0, le=1, description="1: off.")
  class_label: ClassLabel | None = Field(
    None, description="Index or name of a class; stands in for the prompt."
  )
  class_labels: list[ClassLabel] | None = Field(
    None,
    min_length=1,
    max_length=1000,
    description="Several classes, `n` images of each.",
  )

  @property
  def count(self) -> int:
    """Images that are asked for."""
    return (self.n or 1) * len(self.class_labels or [0])


class EditRequest(ImageRequest):
  """Fields of POST /v1/images/edits and variations, beside `image` and `mask`.

  Fields of a form are text: numbers are read from it.
  """

  model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

  strength: float | None = Field(
    None, ge=0, le=1, description="Share of the hidden codes that are drawn anew."
  )
  keep_rows: int | None = Field(
    None, ge=0, le=2**31 - 1, description="First rows of codes that stay."
  )
  # Checked and without effect.
  input_fidelity: Literal["high", "low"] | None = None

  @property
  def settings(self) -> EditSettings:
    return EditSettings(
      strength=1.0 if self.strength is None else self.strength,
      keep_rows=self.keep_rows or 0,
    )


class VariationRequest(EditRequest):
  """Fields of POST /v1/images/variations, beside `image`."""

  needs_no_condition: ClassVar[bool] = True

  @property
  def settings(self) -> EditSettings:
    strength = VARIATION if self.strength is None else self.strength
    return EditSettings(strength=strength, keep_rows=self.keep_rows or 0)


class InputDetails(BaseModel):
  text_tokens: int
  image_tokens: int = 0


class Usage(BaseModel):
  """Tokens of condition and codes of the images."""

  input_tokens: int
  input_tokens_details: InputDetails
  output_tokens: int
  total_tokens: int
  forwards: int = Field(
    description="Of the transformer; with a window fewer than output_tokens."
  )

  @classmethod
  def of(cls, condition_tokens: int, codes: int, forwards: int) -> "Usage":
    return cls(
      input_tokens=condition_tokens,
      input_tokens_details=InputDetails(text_tokens=condition_tokens),
      output_tokens=codes,
      total_tokens=condition_tokens + codes,
      forwards=forwards,
    )


class Style(BaseModel):
  """How the images of a response are stored; part of responses and of events."""

  model: str = Field(description="The name of the model that generated the images.")
  background: Literal["opaque"] = "opaque"
  output_format: OutputFormat
  quality: Literal["auto"] = "auto"
  size: str = Field(description="WIDTHxHEIGHT of the images.")


class Image(BaseModel):
  b64_json: str | None = None
  url: str | None = None


def now() -> int:
  return int(time.time())


Warnings = Annotated[
  list[str] | None, Field(description="Fields that were ignored, and other sizes.")
]


class ImagesResponse(Style):
  created: int = Field(default_factory=now)
  data: list[Image]
  usage: Usage
  seed: int = Field(description="What to send to get these images again.")
  warnings: Warnings = None


class PartialImage(Style):
  """Event: the rows of an image that are generated, grey below them."""

  type: Literal["image_generation.partial_image", "image_edit.partial_image"]
  b64_json: str
  created_at: int = Field(default_factory=now)
  partial_image_index: int
  image_index: int = Field(description="Which of the n images this is.")


class Completed(Style):
  """Event: a finished image."""

  type: Literal["image_generation.completed", "image_edit.completed"]
  b64_json: str | None = None
  url: str | None = None
  created_at: int = Field(default_factory=now)
  image_index: int
  usage: Usage
  seed: int
  warnings: Warnings = None


class Model(BaseModel):
  id: str
  object: Literal["model"] = "model"
  created: int
  owned_by: str = "llamagen"
  size: str = Field(description="WIDTHxHEIGHT that it generates by default.")
  sizes: list[str] = Field(description="All that it generates.")
  condition: Literal["class", "caption"]
  classes: int | None = Field(None, description="Number of classes, if it has any.")
  aliases: list[str] = Field([], description="Other names that requests may use.")


class ModelList(BaseModel):
  object: Literal["list"] = "list"
  data: list[Model]


class ErrorDetail(BaseModel):
  message: str
  type: str
  param: str | None
  code: str | None


class ErrorBody(BaseModel):
  """Every response that is not 2xx."""

  error: ErrorDetail

  @classmethod
  def of(cls, **fields: Any) -> "ErrorBody":
    return cls(error=ErrorDetail(**fields))
