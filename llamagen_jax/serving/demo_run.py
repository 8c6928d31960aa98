"""What the demo's buttons do: requests, and images that appear row by row."""

from collections.abc import AsyncIterator, Awaitable, Sequence
import dataclasses
import time
from typing import Any

from anyio import to_thread
import gradio as gr
import numpy as np

from llamagen_jax.data.classes import shown_name
from llamagen_jax.serving import demo_html
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.demo_editor import from_editor, to_upload
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.request_body import read_request
from llamagen_jax.serving.schema import RANDOM_SEED, EditRequest, VariationRequest
from llamagen_jax.serving.service import ActiveRequest, Service
from llamagen_jax.serving.sizes import text
from llamagen_jax.serving.worker import Finished, Progress

FRAME_SECONDS = 0.15  # between two looks at an unfinished image
# Fields of a request in the order of the page's inputs, after what is to be seen.
SETTINGS = (
  "n", "size", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p",
  "seed",
)  # fmt: skip


@dataclasses.dataclass
class Shown:
  """The images of the last request, as far as they have come."""

  active: ActiveRequest | None = None
  figures: list[str] = dataclasses.field(default_factory=list)
  finished: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def seed(self) -> int:
    return self.active.seed if self.active else RANDOM_SEED

  async def close(self) -> None:
    """Gives up what is not finished; the event that shows it then ends."""
    if self.active:
      self.active.close()


class Run:
  """The events that generate. Each alone writes the images that it began."""

  def __init__(self, service: Service, inputs: Sequence[Any], outputs: Sequence[Any]):
    self.service, self.inputs, self._outputs = service, inputs, outputs

  def start(self, event, *edited) -> None:
    """Binds `generate` to an event of a component; `edited` are an edit's inputs."""
    self._bind(event, self._generate, edited)

  def start_variations(self, event) -> None:
    """Binds `vary` to the event that says which of the last images to vary."""
    self._bind(event, self._vary, ())

  def _bind(self, event, function, edited) -> None:
    # The engine has a queue of its own, so that Gradio's may let everyone pass.
    event(
      function, [self._outputs[-1], *self.inputs, *edited], self._outputs,
      concurrency_limit=None, show_progress="hidden", api_visibility="private",
    )  # fmt: skip

  async def _generate(
    self, before: Shown, *values
  ) -> AsyncIterator[tuple[str, str, Shown]]:
    values, edited = values[: len(self.inputs)], values[len(self.inputs) :]
    admitted = self._admit(body_of(self.service, values), *edited)
    async for outputs in self._follow(before, admitted, values[0]):
      yield outputs

  async def _vary(
    self, event: gr.EventData, before: Shown, *values
  ) -> AsyncIterator[tuple[str, str, Shown]]:
    admitted = self._admit_variation(body_of(self.service, values), before, event.image)
    async for outputs in self._follow(before, admitted, values[0]):
      yield outputs

  async def _follow(
    self, before: Shown, admitted: Awaitable[ActiveRequest], subject: Any
  ) -> AsyncIterator[tuple[str, str, Shown]]:
    """Yields all images as far as they are, and a line that tells how far."""
    await before.close()  # an example, clicked while another one is generated
    try:
      active = await admitted
    except APIError as error:
      yield gr.skip(), demo_html.status(error.message, error=True), gr.skip()
      return
    model, count, shown = active.model, active.body.count, Shown(active)
    shown.figures = [demo_html.blank(model.size, "waits")] * count
    yield demo_html.sheet(shown.figures), demo_html.status("Waiting ...", 0), shown
    try:
      varied = bool(self.service.limits.upload_bytes)
      async for line in _frames(active, shown, _title(model, subject), varied):
        yield demo_html.sheet(shown.figures), line, gr.skip()
      if (finished := len(shown.finished)) < count:
        line = f"Stopped: {finished} of {count} images are finished."
        yield _stopped(shown, model), demo_html.status(line), gr.skip()
    except APIError as error:
      line = demo_html.status(error.message, error=True)
      yield _stopped(shown, model), line, gr.skip()
    finally:
      active.close()

  async def _admit(
    self, fields: dict[str, Any], editor=None, strength: float | None = None
  ) -> ActiveRequest:
    """Queues what the page's inputs ask for."""
    if strength is None:
      body, _ = read_request(fields, strict=True)
      return await self.service.admit(body, [])
    own = self.service.default_model.size  # and the editor's
    fields = {**fields, "strength": strength, "size": text(own)}
    body, _ = read_request(fields, strict=True, kind=EditRequest)
    upload = from_editor(editor, own)
    if upload is None:
      raise APIError(400, "Load an image, or take a result.")
    if upload.mask is None and not body.settings.keeps_some:
      raise APIError(400, "Paint over what to draw anew, or lower the strength.")
    return await self.service.admit(body, [], upload)

  async def _admit_variation(
    self, fields: dict[str, Any], before: Shown, number: int
  ) -> ActiveRequest:
    """Queues variations of one of the images before, in its size."""
    image = before.finished[number]
    fields = {**fields, "size": text((image.shape[1], image.shape[0]))}
    body, _ = read_request(fields, strict=True, kind=VariationRequest)
    return await self.service.admit(body, [], to_upload(image))


def _stopped(shown: Shown, model: ImageModel) -> str:
  """Returns the finished images, and empty frames for the others."""
  blank = demo_html.blank(model.size, "stopped")
  return demo_html.sheet(
    [f if i in shown.finished else blank for i, f in enumerate(shown.figures)]
  )


async def _frames(
  active: ActiveRequest, shown: Shown, title: str, varied: bool
) -> AsyncIterator[str]:
  """Updates the figures as codes come, and yields the line of status.

  Args:
    varied: whether finished images have a button for variations.
  """

  def alt(index: int) -> str:
    return f"{title}, image {index + 1} of {count}"

  model, count = active.model, len(shown.figures)
  tokens, done = active.model.gpt.config.image_tokens, [0] * count
  unseen: dict[int, Progress] = {}  # the longest unseen image comes first
  looked = 0.0
  async for index, event in active.events():
    done[index] = len(event.codes)
    if isinstance(event, Finished):
      unseen.pop(index, None)
      shown.finished[index] = event.image
      name = f"{title.replace(' ', '-')[:40]}-{active.seed}-{index}.png"
      shown.figures[index] = demo_html.finished(
        event.image, alt(index), name, index if varied else None
      )
    else:
      unseen[index] = event
      if time.monotonic() - looked < FRAME_SECONDS:
        continue
      index = next(iter(unseen))
      codes = unseen.pop(index).codes
      image = await to_thread.run_sync(model.render_partly, codes)
      percent = 100 * len(codes) // tokens
      shown.figures[index] = demo_html.unfinished(image, alt(index), percent)
      looked = time.monotonic()
    line, share = f"{sum(done)} of {tokens * count} codes", sum(done) / tokens / count
    yield demo_html.status(line, share)
  if len(shown.finished) < count:  # somebody closed the request
    return
  seconds = time.monotonic() - active.started
  yield demo_html.status(f"Done in {seconds:.1f} s, with seed {active.seed}.")


def _title(model: ImageModel, subject: Any) -> str:
  if model.of_captions:
    return str(subject).strip()
  return shown_name(model.gpt.class_names, subject) or f"class {subject}"


def body_of(service: Service, values: Sequence[Any]) -> dict[str, Any]:
  """Returns the body of the request that the page's inputs stand for."""
  subject, *rest = values
  field = "prompt" if service.default_model.of_captions else "class_label"
  settings = dict(zip(SETTINGS, rest, strict=True))
  if settings["seed"] is None:
    settings["seed"] = RANDOM_SEED
  return {field: subject, **settings}
