"""A model as the API sees it: what a request draws, and what becomes of its codes."""

import dataclasses
import functools
import io
import threading
from typing import Any

import jax
import numpy as np
from PIL import Image

from llamagen_jax.data.classes import RANGE, to_labels
from llamagen_jax.errors import UserError
from llamagen_jax.sampling.prompts import Prompts
from llamagen_jax.sampling.sample import check_pair, render
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.request import Request
from llamagen_jax.serving.schema import ImageRequest, Style, Usage
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.weights import bundle

SAMPLING = (
  "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p",
)  # fmt: skip
LONGEST_CLASS = 200  # characters of a name
KEPT_PROMPTS = 256  # whose features are kept
GREY = 128  # of codes that are not drawn yet


class ImageModel:
  """A transformer, the tokenizer of its codes, and the encoder of its prompts.

  Methods block, and may run in several threads at once.
  """

  def __init__(
    self,
    name: str,
    gpt: bundle.Transformer,
    tokenizer: bundle.Tokenizer,
    encoder: TextEncoder | None = None,
  ):
    check_pair(gpt, tokenizer)
    self.name, self.gpt, self.tokenizer, self.encoder = name, gpt, tokenizer, encoder
    if self.of_captions:
      if encoder is None:
        raise UserError("the transformer draws prompts: give --t5, its text encoder")
      Prompts.of(gpt, encoder, [])  # refuses another encoder than the one it learned
    self._features = functools.lru_cache(KEPT_PROMPTS)(self._encode_prompt)
    self._encoding = threading.Lock()

  @property
  def of_captions(self) -> bool:
    return self.gpt.config.condition == "caption"

  @property
  def side(self) -> int:
    """Of the images, in pixels."""
    return self.gpt.config.grid * self.tokenizer.config.downsample

  @property
  def size(self) -> str:
    return f"{self.side}x{self.side}"

  def requests(self, body: ImageRequest, seed: int) -> list[Request]:
    """A request an image: those of `llamagen sample --count n` with that seed.

    Raises:
      APIError: for a model, size, prompt or class that is not there.
    """
    if body.model not in (None, self.name):
      raise APIError(
        404,
        f"The model '{body.model}' does not exist; this server has '{self.name}'.",
        code="model_not_found",
        param="model",
      )
    if body.size not in (None, "auto", self.size):
      message = f"Invalid size '{body.size[:40]}': expected '{self.size}' or 'auto'."
      raise APIError(400, message, code="invalid_value", param="size")
    given = {field: getattr(body, field) for field in SAMPLING}
    sampling = dataclasses.replace(
      self.gpt.sampling, **{k: v for k, v in given.items() if v is not None}
    )
    conditions = [c for c in self._conditions(body) for _ in range(body.n or 1)]
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(conditions))]
    return [
      Request(condition, key, sampling, mask)
      for (condition, mask), key in zip(conditions, keys, strict=True)
    ]

  def _conditions(self, body: ImageRequest) -> list[tuple[Any, np.ndarray | None]]:
    """Conditions and masks: labels, or features [P, C] and [P]."""
    named = "class_label" if body.class_label is not None else "class_labels"
    labels = body.class_labels if body.class_label is None else [body.class_label]
    if self.of_captions:
      if labels is not None:
        message = "This model draws prompts, not classes."
        raise APIError(400, message, code="invalid_value", param=named)
      if not (body.prompt or "").strip():
        raise APIError(400, "A prompt is required.", code="missing", param="prompt")
      return [self._features(body.prompt)]
    if labels is None:
      named, labels = "prompt", [(body.prompt or "").strip().removeprefix("class:")]
    return [(self._label(named, label), None) for label in labels]

  def _label(self, param: str, label: int | str) -> int:
    text = str(label).strip()
    try:
      if not text or len(text) > LONGEST_CLASS or "," in text or RANGE.fullmatch(text):
        found = f"{text[:40]!r}" if text else "nothing"
        raise UserError(f"{found}: expected one class, an index or a name")
      [found] = to_labels([text], self.gpt.class_names, self.gpt.config.num_classes)
    except UserError as error:
      raise APIError(400, f"{error}.", code="invalid_value", param=param) from error
    return found

  def _encode_prompt(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    with self._encoding:  # one at a time: an encoder is as large as a transformer
      features, mask = Prompts.of(self.gpt, self.encoder, [prompt]).take(np.array([0]))
    return features[0], mask[0]

  def usage(self, images: int) -> Usage:
    c = self.gpt.config
    return Usage.of(c.prefix_tokens * images, c.image_tokens * images)

  def style(self, body: ImageRequest) -> dict[str, str]:
    return Style(output_format=body.output_format or "png", size=self.size).model_dump()

  def render(self, codes_BT: np.ndarray) -> np.ndarray:
    """int32 codes [B, T] -> uint8 images [B, side, side, 3], one at a time."""
    shape = (self.gpt.config.grid, self.side, None)
    config, params = self.tokenizer.config, self.tokenizer.params
    return np.concatenate(
      [render(config, *shape, params, codes[None]) for codes in codes_BT]
    )

  def render_partly(self, codes: np.ndarray) -> np.ndarray:
    """The first codes, int32 [t], -> uint8 [side, side, 3], grey where none is."""
    c, drawn = self.gpt.config, len(codes)
    padded = np.zeros(c.image_tokens, np.int32)
    padded[:drawn] = codes
    # Convolutions look beyond the last row: at something that goes on like it.
    for i in range(drawn, c.image_tokens):
      padded[i] = padded[i - c.grid] if i >= c.grid else padded[drawn - 1]
    image = self.render(padded[None])[0].copy()
    blank = (np.arange(c.image_tokens) >= drawn).reshape(c.grid, c.grid)
    image[blank.repeat(self.side // c.grid, 0).repeat(self.side // c.grid, 1)] = GREY
    return image

  def encode(self, image: np.ndarray, body: ImageRequest) -> bytes:
    """uint8 [H, W, 3] -> a file in the format that was asked for."""
    kind = body.output_format or "png"
    quality = 100 if body.output_compression is None else body.output_compression
    options = {} if kind == "png" else {"quality": quality}
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind, **options)
    return file.getvalue()

  def warm_up(self) -> None:
    """Compiles what the methods above run."""
    self.render(np.zeros((1, self.gpt.config.image_tokens), np.int32))
    jax.random.fold_in(jax.random.key(0), 0)
    if self.of_captions:
      self._features("warm up")
