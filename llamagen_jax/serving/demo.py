"""The web demo at /demo: images that appear while their codes are generated."""

from collections.abc import AsyncIterator, Awaitable, Sequence
import dataclasses
import hmac
import time
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
import gradio as gr
import numpy as np

from llamagen_jax.data.classes import shown_name
from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES, SamplingConfig
from llamagen_jax.serving import demo_html
from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.auth import KEY
from llamagen_jax.serving.demo_editor import (
  from_editor,
  make_editor,
  to_editor,
  to_upload,
)
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.request_body import read_request
from llamagen_jax.serving.schema import RANDOM_SEED, EditRequest, VariationRequest
from llamagen_jax.serving.service import ActiveRequest, Service
from llamagen_jax.serving.sizes import text
from llamagen_jax.serving.worker import Finished, Progress

PATH = "/demo"
USER = "demo"  # whose password is the API key
FRAME_SECONDS = 0.15  # between two looks at an unfinished image
HIGHEST_GUIDANCE, HIGHEST_TEMPERATURE = 20.0, 2.0
LARGEST_SEED = 2**53 - 1  # that a browser can hold
PROMPTS = (
  "a red fox on a green hill", "a lighthouse by the sea at night",
  "a bowl of fruit on a wooden table", "a sailing boat on calm water",
)  # fmt: skip
SETTINGS = (
  "n", "size", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p",
  "seed",
)  # fmt: skip


def mount_demo(
  app: FastAPI, service: Service, api_key: str = "", prompts: Sequence[str] = PROMPTS
) -> None:
  """Adds the demo to a server; with a key it asks for it as a password.

  Args:
    prompts: examples, where the default model takes captions.
  """

  def knows(user: str, password: str) -> bool:
    return hmac.compare_digest(password.encode(), api_key.encode())

  @app.get(PATH, include_in_schema=False)
  async def with_a_slash(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{str(request.base_url).rstrip('/')}{PATH}/")

  gr.mount_gradio_app(
    app,
    make_demo(service, KEY if api_key else "", prompts),
    PATH,
    auth=knows if api_key else None,
    auth_message=f"User {USER}, and the API key as password.",
    theme=gr.themes.Soft(
      primary_hue="indigo", neutral_hue="slate", font="system-ui", font_mono="monospace"
    ),
    head=f"<style>{demo_html.CSS}</style>",  # `css` would not reach the page's frame
    show_error=False,
    footer_links=[],
    ssr_mode=False,
  )


def make_demo(
  service: Service, key: str = "", prompts: Sequence[str] = PROMPTS
) -> gr.Blocks:
  """Returns the page of the default model.

  Gradio runs its functions in the server's own event loop.
  """
  model = service.default_model
  with gr.Blocks(title="LlamaGen", fill_width=True, analytics_enabled=False) as page:
    gr.Markdown(_heading(model), elem_id="heading")
    with gr.Row():
      with gr.Column(scale=2, min_width=280):
        subject = _subject(model, prompts)
        with gr.Tabs():
          with gr.Tab("Generate"):
            generate, stop = _start_and_stop("Generate")
            with gr.Row(elem_id="examples"):
              examples = [
                (gr.Button(label, size="sm", variant="secondary"), value)
                for label, value in _examples(model, prompts)
              ]
          if service.limits.upload_bytes:
            with gr.Tab("Edit"):
              tab = _EditTab(model)
        settings, reuse = _settings(service)
        with gr.Accordion("Use it from code", open=False):
          code = [
            gr.Code(language="shell", label="curl", interactive=False, elem_id="curl"),
            gr.Code(language="python", label="Python", interactive=False),
          ]
      with gr.Column(scale=3, min_width=280):
        status = gr.HTML(demo_html.status("Ready."), elem_id="status", padding=False)
        sheet = gr.HTML(
          _blank_sheet(model, settings[0].value), elem_id="images", padding=False,
          js_on_load=demo_html.TELL_WHICH_TO_VARY,
        )  # fmt: skip
    shown = gr.State(_Shown())
    run = _Run(service, [subject, *settings], [sheet, status, shown])
    run.start(generate.click)
    if model.of_captions:
      run.start(subject.submit)
    for button, value in examples:
      chosen = button.click(
        lambda value=value: value, None, subject, api_visibility="private"
      )
      run.start(chosen.then)
    # Not by Gradio's `cancels`: frames on their way would come after what it shows.
    stop.click(_Shown.close, shown, api_visibility="private")
    if service.limits.upload_bytes:
      tab.bind(run, shown)
      run.start_variations(sheet.click)
    reuse.click(lambda shown: shown.seed, shown, settings[-1], api_visibility="private")

    def as_code(request: gr.Request, *values) -> list[str]:
      return _code(service, key, request, values)

    gr.on(
      [page.load, *(setting.change for setting in run.inputs)],
      as_code, run.inputs, code, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
  return page


@dataclasses.dataclass
class _Shown:
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


class _Run:
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
    self, before: _Shown, *values
  ) -> AsyncIterator[tuple[str, str, _Shown]]:
    values, edited = values[: len(self.inputs)], values[len(self.inputs) :]
    admitted = self._admit(_body(self.service, values), *edited)
    async for outputs in self._follow(before, admitted, values[0]):
      yield outputs

  async def _vary(
    self, event: gr.EventData, before: _Shown, *values
  ) -> AsyncIterator[tuple[str, str, _Shown]]:
    admitted = self._admit_variation(_body(self.service, values), before, event.image)
    async for outputs in self._follow(before, admitted, values[0]):
      yield outputs

  async def _follow(
    self, before: _Shown, admitted: Awaitable[ActiveRequest], subject: Any
  ) -> AsyncIterator[tuple[str, str, _Shown]]:
    """Yields all images as far as they are, and a line that tells how far."""
    await before.close()  # an example, clicked while another one is generated
    try:
      active = await admitted
    except APIError as error:
      yield gr.skip(), demo_html.status(error.message, error=True), gr.skip()
      return
    model, count, shown = active.model, active.body.count, _Shown(active)
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
    self, fields: dict[str, Any], before: _Shown, number: int
  ) -> ActiveRequest:
    """Queues variations of one of the images before, in its size."""
    image = before.finished[number]
    fields = {**fields, "size": text((image.shape[1], image.shape[0]))}
    body, _ = read_request(fields, strict=True, kind=VariationRequest)
    return await self.service.admit(body, [], to_upload(image))


class _EditTab:
  """Inputs of an edit, in the tab that is being made."""

  def __init__(self, model: ImageModel):
    gr.Markdown("Load an image or take a result, and paint over what to draw anew.")
    self._editor = make_editor(model.size)
    self._take = gr.Button("Take the first result", size="sm", elem_id="take")
    self._strength = gr.Slider(
      0, 1, 1, step=0.05, label="Strength", elem_id="strength",
      info="share that is drawn anew of what is painted, or of all if nothing is",
    )  # fmt: skip
    self._draw, self._stop = _start_and_stop("Draw", "edit-")

  def bind(self, run: _Run, shown: gr.State) -> None:
    """Lets the tab's buttons do what they say."""
    run.start(self._draw.click, self._editor, self._strength)
    self._stop.click(_Shown.close, shown, api_visibility="private")

    def last(shown: _Shown) -> Any:
      if not shown.finished:
        return gr.skip()
      return to_editor(shown.finished[min(shown.finished)])

    self._take.click(last, shown, self._editor, api_visibility="private")


def _start_and_stop(verb: str, prefix: str = "") -> tuple[gr.Button, gr.Button]:
  with gr.Row():
    start = gr.Button(
      verb, variant="primary", min_width=100, elem_id=f"{prefix}{verb.lower()}"
    )
    return start, gr.Button("Stop", min_width=100, elem_id=f"{prefix}stop")


def _stopped(shown: _Shown, model: ImageModel) -> str:
  """Returns the finished images, and empty frames for the others."""
  blank = demo_html.blank(model.size, "stopped")
  return demo_html.sheet(
    [f if i in shown.finished else blank for i, f in enumerate(shown.figures)]
  )


async def _frames(
  active: ActiveRequest, shown: _Shown, title: str, varied: bool
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


def _heading(model: ImageModel) -> str:
  kind = "a prompt" if model.of_captions else f"one of {model.classes} classes"
  width, height = model.size
  return f"# LlamaGen\n{model.name}: {width} x {height} pixels, from {kind}."


def _subject(model: ImageModel, prompts: Sequence[str]) -> gr.components.Component:
  """Returns the input for the text, or for one of the classes."""
  if model.of_captions:
    return gr.Textbox(prompts[0], label="Prompt", lines=2, elem_id="subject")
  choices = [(_choice(model, label), label) for label in range(model.classes)]
  return gr.Dropdown(
    choices, value=0, label="Class", filterable=True, elem_id="subject"
  )


def _settings(service: Service) -> tuple[list[gr.components.Component], gr.Button]:
  """Returns the inputs of SETTINGS, and the button that keeps the last seed."""
  model, most = service.default_model, service.most_images(service.default_model)
  d: SamplingConfig = model.gpt.sampling
  most_k = model.gpt.config.vocab_size
  count = gr.Slider(1, most, min(4, most), step=1, label="Images")
  sizes = list(map(text, service.sizes(model)))
  size = gr.Dropdown(
    sizes, value=sizes[0], label="Size", visible=len(sizes) > 1, elem_id="size"
  )
  guidance = gr.Slider(
    1, HIGHEST_GUIDANCE, d.guidance_scale, step=0.1, label="Guidance", info="1: off"
  )
  with gr.Accordion("More settings", open=False):
    rest = [
      gr.Dropdown(
        GUIDANCE_SCHEDULES, value=d.guidance_schedule, label="Guidance schedule"
      ),
      gr.Slider(
        0, HIGHEST_TEMPERATURE, d.temperature, step=0.05, label="Temperature",
        info="0: the most probable code",
      ),
      gr.Slider(0, most_k, d.top_k, step=1, label="Top k", info="0: off"),
      gr.Slider(0.05, 1, d.top_p, step=0.05, label="Top p", info="1: off"),
      gr.Number(
        RANDOM_SEED, label="Seed", info="-1: another one every time", precision=0,
        minimum=RANDOM_SEED, maximum=LARGEST_SEED, elem_id="seed",
      ),
    ]  # fmt: skip
    reuse = gr.Button("Use the last seed again", size="sm", elem_id="reuse")
  return [count, size, guidance, *rest], reuse


def _choice(model: ImageModel, label: int) -> str:
  name = shown_name(model.gpt.class_names, label)
  return f"class {label}" if name in ("", str(label)) else f"{name} ({label})"


def _title(model: ImageModel, subject: Any) -> str:
  if model.of_captions:
    return str(subject).strip()
  return shown_name(model.gpt.class_names, subject) or f"class {subject}"


def _examples(model: ImageModel, prompts: Sequence[str]) -> list[tuple[str, Any]]:
  """Returns labels of buttons, and the subject that each generates."""
  if model.of_captions:
    return [(prompt, prompt) for prompt in prompts]
  labels = dict.fromkeys(int(model.classes * share) for share in (0.1, 0.3, 0.5, 0.8))
  return [(_choice(model, label), label) for label in labels]


def _blank_sheet(model: ImageModel, count: int) -> str:
  return demo_html.sheet([demo_html.blank(model.size)] * count)


def _body(service: Service, values: Sequence[Any]) -> dict[str, Any]:
  """Returns the body of the request that the page's inputs stand for."""
  subject, *rest = values
  field = "prompt" if service.default_model.of_captions else "class_label"
  settings = dict(zip(SETTINGS, rest, strict=True))
  if settings["seed"] is None:
    settings["seed"] = RANDOM_SEED
  return {field: subject, **settings}


def _code(
  service: Service, key: str, request: gr.Request, values: Sequence[Any]
) -> list[str]:
  """Returns curl and Python for the same request, less settings at their default."""
  defaults = dataclasses.asdict(service.default_model.gpt.sampling)
  defaults |= {"n": 1, "seed": RANDOM_SEED}
  defaults |= {"size": text(service.default_model.size)}
  body = _body(service, values)
  body = {k: v for k, v in body.items() if k not in defaults or v != defaults[k]}
  root = str(request.request.base_url).rstrip("/").removesuffix(PATH)
  return [demo_html.curl(root, body, key), demo_html.python(root, body, key)]
