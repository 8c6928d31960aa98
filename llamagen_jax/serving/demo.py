"""The web demo at /demo: images that appear while they are drawn."""

import base64
from collections.abc import AsyncIterator
import hmac
import time
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
import gradio as gr
import numpy as np
from pydantic import ValidationError

from llamagen_jax.data.classes import shown_name
from llamagen_jax.gpt.sampling_config import SCHEDULES, SamplingConfig
from llamagen_jax.serving.api_error import APIError, from_validation
from llamagen_jax.serving.image_model import GREY, ImageModel
from llamagen_jax.serving.protocol import Finished
from llamagen_jax.serving.schema import LARGEST_SEED, ImageRequest
from llamagen_jax.serving.service import Service

PATH = "/demo"
USER = "demo"  # whose password is the API key
FRAME_SECONDS = 0.15  # between two looks at an unfinished image
HIGHEST_GUIDANCE, HIGHEST_TEMPERATURE = 20.0, 2.0
PROMPTS = (
  "a red fox on a green hill", "a lighthouse by the sea at night",
  "a bowl of fruit on a wooden table",
)  # fmt: skip
UNFINISHED = ImageRequest(output_format="webp", output_compression=70)  # sent often
FINISHED = ImageRequest(output_format="png")
# Small images stay sharp, and nothing is wider than a phone.
CSS = """
.images { display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem; }
.images img { width: 100%; image-rendering: pixelated; border-radius: 0.4rem; }
.gradio-container { width: 100%; max-width: 70rem !important; margin: auto; }
@media (max-width: 640px) { .gradio-container { padding: 0.5rem !important; } }
"""


def mount_demo(app: FastAPI, service: Service, api_key: str = "") -> None:
  """Adds the demo to a server; with a key it asks for it as a password."""

  def knows(user: str, password: str) -> bool:
    return hmac.compare_digest(password.encode(), api_key.encode())

  gr.mount_gradio_app(
    app,
    make_demo(service),
    PATH,
    auth=knows if api_key else None,
    auth_message=f"User {USER}, and the API key as password.",
    theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
    css=CSS,
    show_error=False,
    footer_links=[],
    ssr_mode=False,
  )


def make_demo(service: Service) -> gr.Blocks:
  """The page. Gradio runs its functions in the server's own event loop."""
  image_model, defaults = service.image_model, service.image_model.gpt.sampling
  most = service.limits.images
  with gr.Blocks(title="LlamaGen", fill_width=True, analytics_enabled=False) as page:
    gr.Markdown("## LlamaGen: images, one code at a time")
    with gr.Row():
      with gr.Column(scale=2, min_width=280):
        subject = _subject(image_model)
        with gr.Row():
          draw = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
          stop = gr.Button("Stop", min_width=100, elem_id="stop")
        count = gr.Slider(1, most, min(4, most), step=1, label="Images")
        guidance = gr.Slider(
          1, HIGHEST_GUIDANCE, defaults.guidance_scale, step=0.1, label="Guidance"
        )
      with gr.Column(scale=3, min_width=280):
        sheet = gr.HTML(elem_id="images")
        status = gr.Markdown(elem_id="status")
    with gr.Accordion("More settings", open=False):
      more = _settings(image_model.gpt.config.vocab_size, defaults)
    gr.Examples(_examples(service), [subject, guidance, more[-1]], label="Examples")
    settings = [subject, count, guidance, *more]

    async def run(*values):
      async for update in _draw(service, *values):
        yield update

    # The engine has a queue of its own, so that Gradio's may let everyone pass.
    running = draw.click(
      run, settings, [sheet, status], concurrency_limit=None, show_progress="hidden",
      api_visibility="private",
    )  # fmt: skip
    stop.click(None, cancels=[running], api_visibility="private")
  return page


def _subject(image_model: ImageModel) -> gr.components.Component:
  """What to draw: a text, or one of the classes."""
  if image_model.of_captions:
    return gr.Textbox(PROMPTS[0], label="Prompt", lines=2, elem_id="subject")
  names = image_model.gpt.class_names
  labels = range(image_model.gpt.config.num_classes)
  choices = [(_choice(names, label), label) for label in labels]
  return gr.Dropdown(
    choices, value=0, label="Class", filterable=True, elem_id="subject"
  )


def _settings(
  vocabulary: int, defaults: SamplingConfig
) -> list[gr.components.Component]:
  """Schedule, temperature, top k, top p and seed."""
  temperature = (0.1, HIGHEST_TEMPERATURE, defaults.temperature)
  return [
    gr.Dropdown(SCHEDULES, value=defaults.guidance_schedule, label="Guidance schedule"),
    gr.Slider(*temperature, step=0.05, label="Temperature"),
    gr.Slider(0, vocabulary, defaults.top_k, step=1, label="Top k", info="0: off"),
    gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top p", info="1: off"),
    gr.Number(
      -1, label="Seed", info="-1: another one every time", precision=0,
      minimum=-1, maximum=LARGEST_SEED,
    ),
  ]  # fmt: skip


def _choice(names: tuple[str, ...], label: int) -> str:
  name = shown_name(names, label)
  return name if name == str(label) else f"{name} ({label})"


def _examples(service: Service) -> list[list[Any]]:
  """Subject, guidance and seed."""
  image_model, scale = (
    service.image_model,
    max(service.image_model.gpt.sampling.guidance_scale, 2.0),
  )
  if image_model.of_captions:
    return [[prompt, scale, seed] for seed, prompt in enumerate(PROMPTS)]
  classes = image_model.gpt.config.num_classes
  spread = dict.fromkeys(int(classes * part) for part in (0.1, 0.3, 0.5, 0.8))
  return [[label, scale, seed] for seed, label in enumerate(spread)]


async def _draw(
  service: Service, subject, count, guidance, schedule, temperature, top_k, top_p, seed
) -> AsyncIterator[tuple[str, str]]:
  """Yields all images as far as they are, as HTML, and a line that tells how far."""
  image_model = service.image_model
  fields = {"prompt": subject} if image_model.of_captions else {"class_label": subject}
  try:
    body = ImageRequest(
      n=count, guidance_scale=guidance, guidance_schedule=schedule,
      temperature=temperature, top_k=top_k, top_p=top_p,
      seed=None if seed is None or seed < 0 else int(seed), **fields,
    )  # fmt: skip
    drawing = await service.admit(body)
  except ValidationError as error:
    first = error.errors()[0]
    first["loc"] = ("body", *first["loc"])
    raise gr.Error(from_validation(first).message) from error
  except APIError as error:
    raise gr.Error(error.message) from error
  blank = np.full((image_model.side, image_model.side, 3), GREY, np.uint8)
  figures, codes = [_figure(image_model, blank)] * count, [0] * count
  total, shown = image_model.gpt.config.image_tokens * count, 0.0
  try:
    async for index, event in drawing.events():
      codes[index] = len(event.codes)
      finished = isinstance(event, Finished)
      if not finished and time.monotonic() - shown < FRAME_SECONDS:
        continue
      if finished:
        name = f"{drawing.seed}-{index}.png"
        figures[index] = _figure(image_model, event.image, name)
      else:
        image = await to_thread.run_sync(image_model.render_partly, event.codes)
        figures[index] = _figure(image_model, image)
      shown = time.monotonic()
      yield _sheet(figures), f"{sum(codes)} of {total} codes"
    yield (
      _sheet(figures),
      f"Done, with seed {drawing.seed}. Click an image to keep it.",
    )
  except APIError as error:
    raise gr.Error(error.message) from error
  finally:
    drawing.close()


def _figure(image_model: ImageModel, image: np.ndarray, name: str = "") -> str:
  """uint8 [H, W, 3] -> HTML; a finished image has a name, and a click saves it.

  The pixels are in the page itself: files behind it would be written while the browser
  reads them, because an image changes many times a second.
  """
  style = FINISHED if name else UNFINISHED
  data = base64.b64encode(image_model.encode(image, style)).decode()
  tag = f'<img alt="{name}" src="data:image/{style.output_format};base64,{data}">'
  link = f'<a download="{name}" href="data:image/png;base64,{data}">{tag}</a>'
  return link if name else tag


def _sheet(figures: list[str]) -> str:
  return f'<div class="images">{"".join(figures)}</div>'
