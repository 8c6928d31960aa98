"""A model as the API sees it: a body -> requests for the engine, codes -> images."""

from collections.abc import Sequence
import dataclasses
import functools
import io
import re
import threading
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from llamagen_jax.data.classes import RANGE, shown_name, to_label
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.sampling.edit import Canvas, feather, redrawn_cells
from llamagen_jax.sampling.keys import image_keys
from llamagen_jax.sampling.prompts import Prompts
from llamagen_jax.sampling.sample import check_pair, render
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.request import Request
from llamagen_jax.serving.schema import (
  GREEDY_TEMPERATURE,
  LONGEST_CLASS,
  EditRequest,
  ImageRequest,
  Usage,
)
from llamagen_jax.serving.sizes import Size
from llamagen_jax.sides import Sides, height_width, image_size_of
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.weights import bundle

SAMPLING = (
  "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p",
)  # fmt: skip
KEPT_PROMPTS = 256  # whose features are kept
GREY = 128  # of codes that are not sampled yet


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
    if gpt.sampling.order != "raster":
      raise UserError(
        f"{name}: the bundle has sampling.order={gpt.sampling.order}; serve draws codes"
        " in raster order only"
      )
    gpt.sampling.check_model(gpt.config)
    self.name, self.gpt, self.tokenizer, self.encoder = name, gpt, tokenizer, encoder
    if self.of_captions:
      if encoder is None:
        raise UserError("the transformer takes prompts: give --t5, its text encoder")
      Prompts.of(gpt, encoder, [])  # refuses another encoder than the one it learned
    self._features = functools.lru_cache(KEPT_PROMPTS)(self._encode_prompt)
    self._encoding = threading.Lock()

  @property
  def of_captions(self) -> bool:
    return self.gpt.config.condition == "caption"

  @property
  def classes(self) -> int:
    """Number of classes; 0 for a model of captions."""
    return 0 if self.of_captions else self.gpt.config.num_classes

  @property
  def size(self) -> Size:
    """Width and height of the images that it generates."""
    height, width = height_width(self._sides)
    return width, height

  @property
  def _sides(self) -> Sides:
    return image_size_of(self.gpt.config.grid, self.tokenizer.config.downsample)

  def requests(
    self, body: ImageRequest, seed: int, canvas: Canvas | None = None
  ) -> list[Request]:
    """Returns one request an image: those of `llamagen sample` with that seed.

    With a canvas they are those of `llamagen edit`.

    Raises:
      APIError: 400 for a prompt or a class that the model cannot take.
    """
    sampling, negative = self._sampling(body), (None, None)
    if self.of_captions and (body.negative_prompt or "").strip():
      negative = self._features(body.negative_prompt)
    conditions = [c for c in self._conditions(body) for _ in range(body.n or 1)]
    keys = image_keys(seed, range(len(conditions)))
    requests = [
      Request(condition, key, sampling, mask, *negative)
      for (condition, mask), key in zip(conditions, keys, strict=True)
    ]
    return requests if canvas is None else self._edits(requests, body, seed, canvas)

  def _edits(
    self, requests: list[Request], body: EditRequest, seed: int, canvas: Canvas
  ) -> list[Request]:
    """Returns the requests with the codes of a canvas that they keep."""
    settings, scale = body.settings, self.tokenizer.config.downsample
    hidden = canvas.hidden_cells(scale)
    with self._encoding:
      codes = np.asarray(self.tokenizer.encode(canvas.seen(settings)[None])).ravel()
    redrawn = redrawn_cells(hidden, settings, seed, len(requests))
    return [
      dataclasses.replace(
        request, canvas=canvas, known=codes, is_known=~cells.ravel(),
        feather=feather(scale),
      )
      for request, cells in zip(requests, redrawn, strict=True)
    ]  # fmt: skip

  def warnings(self, body: ImageRequest) -> list[str]:
    """Returns a line for each field that is valid and means nothing to this model."""
    if body.negative_prompt and not self.of_captions:
      return ["'negative_prompt' is ignored: this model generates classes."]
    return []

  def _sampling(self, body: ImageRequest) -> SamplingConfig:
    given = {field: getattr(body, field) for field in SAMPLING}
    given = {field: value for field, value in given.items() if value is not None}
    if "temperature" in given:
      given["greedy"] = given["temperature"] < GREEDY_TEMPERATURE
      if given["greedy"]:
        given["temperature"] = 1.0
    if "guidance_scale" in given:
      given["guidance_scale"] = max(1.0, given["guidance_scale"])
    return dataclasses.replace(self.gpt.sampling, **given)

  def _conditions(self, body: ImageRequest) -> list[tuple[Any, np.ndarray | None]]:
    """Returns conditions and masks: labels, or features [P, C] and [P]."""
    named = "class_label" if body.class_label is not None else "class_labels"
    labels = body.class_labels if body.class_label is None else [body.class_label]
    if self.of_captions:
      if labels is not None:
        message = f"'{named}': this model takes a 'prompt', such as 'a red fox'."
        raise APIError(400, message, code="invalid_value", param=named)
      if not (body.prompt or "").strip():
        message = "A prompt is required, such as 'a red fox'."
        raise APIError(400, message, code="missing", param="prompt")
      return [self._features(body.prompt)]
    if labels is None and not (body.prompt or "").strip() and body.needs_no_condition:
      return [(self.classes, None)]  # the label of no class
    if labels is None:
      named, labels = "prompt", [(body.prompt or "").strip().removeprefix("class:")]
    return [(self._label(named, label), None) for label in labels]

  def _label(self, param: str, label: int | str) -> int:
    word = str(label).strip()
    named = word.casefold() in {name.casefold() for name in self.gpt.class_names}
    several = len(word) > LONGEST_CLASS or "," in word or RANGE.fullmatch(word)
    number = re.fullmatch(r"-?\d+", word)
    try:
      if not word:
        raise UserError("no class is given")
      if several and not named:
        raise UserError(f"{word[:40]!r} is not one class")
      if number and not named and not 0 <= int(word) < self.classes:
        raise UserError(f"there is no class {word[:40]}")
      given = label if isinstance(label, int) else word  # a number is an index
      return to_label(given, self.gpt.class_names, self.classes)
    except UserError as error:
      message = f"Invalid '{param}': {str(error)[:200]}. {self._expected_class()}."
      raise APIError(400, message, code="invalid_value", param=param) from error

  def _expected_class(self) -> str:
    last = self.classes - 1
    name = shown_name(self.gpt.class_names, last)
    example = str(last) if name in ("", str(last)) else f"{last} or '{name}'"
    return f"Expected a class, 0 .. {last} or its name, such as {example}"

  def _encode_prompt(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    with self._encoding:  # one at a time: an encoder is as large as a transformer
      features, mask = Prompts.of(self.gpt, self.encoder, [prompt]).take(np.array([0]))
    return features[0], mask[0]

  def usage(self, requests: Sequence[Request]) -> Usage:
    """Returns what finished requests took."""
    c, count = self.gpt.config, len(requests)
    forwards = sum(request.forwards for request in requests)
    return Usage.of(c.prefix_tokens * count, c.image_tokens * count, forwards)

  def render(self, codes_BT: np.ndarray) -> np.ndarray:
    """int32 codes [B, T] -> uint8 images [B, H, W, 3], one at a time."""
    shape = (self.gpt.config.grid, self._sides, None)
    config, params = self.tokenizer.config, self.tokenizer.params
    return np.concatenate(
      [render(config, *shape, params, codes[None]) for codes in codes_BT]
    )

  def render_partly(self, codes: np.ndarray) -> np.ndarray:
    """The first codes, int32 [t], -> uint8 [H, W, 3], grey where none is."""
    c, count = self.gpt.config, len(codes)
    rows, columns = c.grid_hw
    padded = np.zeros(c.image_tokens, np.int32)
    padded[:count] = codes
    # Convolutions see codes below the last one: give them a plausible continuation.
    for i in range(count, c.image_tokens):
      padded[i] = padded[i - columns] if i >= columns else padded[count - 1]
    image = self.render(padded[None])[0].copy()
    blank = (np.arange(c.image_tokens) >= count).reshape(rows, columns)
    pixels = self.tokenizer.config.downsample
    image[blank.repeat(pixels, 0).repeat(pixels, 1)] = GREY
    return image

  def warm_up(self, edits: bool = False) -> None:
    """Compiles the programs that the methods above run, those of edits if asked to."""
    self.render(np.zeros((1, self.gpt.config.image_tokens), np.int32))
    if edits:
      self.tokenizer.encode(np.zeros((1, *height_width(self._sides), 3), np.uint8))
    if self.of_captions:
      self._features("warm up")


def encode_image(image: np.ndarray, body: ImageRequest, size: Size) -> bytes:
  """Returns the file of an image, uint8 [H, W, 3], in the format asked for."""
  kind = body.output_format or "png"
  quality = 100 if body.output_compression is None else body.output_compression
  options = {} if kind == "png" else {"quality": quality}
  file, opened = io.BytesIO(), Image.fromarray(image)
  if size != opened.size:  # scaled without distortion, and cropped around the centre
    opened = ImageOps.fit(opened, size, Image.Resampling.LANCZOS)
  opened.save(file, format=kind, **options)
  return file.getvalue()
