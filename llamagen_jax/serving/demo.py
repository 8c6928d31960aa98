"""The web demo at /demo: images that appear while their codes are generated."""

from collections.abc import Sequence
import dataclasses
import hmac
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
import gradio as gr

from llamagen_jax.data.classes import shown_name
from llamagen_jax.gpt.sampling_config import GUIDANCE_SCHEDULES, SamplingConfig
from llamagen_jax.serving import demo_html
from llamagen_jax.serving.auth import KEY
from llamagen_jax.serving.demo_editor import make_editor, to_editor
from llamagen_jax.serving.demo_run import Run, Shown, body_of
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.schema import RANDOM_SEED
from llamagen_jax.serving.service import Service
from llamagen_jax.serving.sizes import text

PATH = "/demo"
USER = "demo"  # whose password is the API key
HIGHEST_GUIDANCE, HIGHEST_TEMPERATURE = 20.0, 2.0
LARGEST_SEED = 2**53 - 1  # that a browser can hold
PROMPTS = (
  "a red fox on a green hill", "a lighthouse by the sea at night",
  "a bowl of fruit on a wooden table", "a sailing boat on calm water",
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
    shown = gr.State(Shown())
    run = Run(service, [subject, *settings], [sheet, status, shown])
    run.start(generate.click)
    if model.of_captions:
      run.start(subject.submit)
    for button, value in examples:
      chosen = button.click(
        lambda value=value: value, None, subject, api_visibility="private"
      )
      run.start(chosen.then)
    # Not by Gradio's `cancels`: frames on their way would come after what it shows.
    stop.click(Shown.close, shown, api_visibility="private")
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

  def bind(self, run: Run, shown: gr.State) -> None:
    """Lets the tab's buttons do what they say."""
    run.start(self._draw.click, self._editor, self._strength)
    self._stop.click(Shown.close, shown, api_visibility="private")

    def last(shown: Shown) -> Any:
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
    1, max(HIGHEST_GUIDANCE, d.guidance_scale), d.guidance_scale, step=0.1,
    label="Guidance", info="1: off",
  )  # fmt: skip
  with gr.Accordion("More settings", open=False):
    rest = [
      gr.Dropdown(
        GUIDANCE_SCHEDULES, value=d.guidance_schedule, label="Guidance schedule"
      ),
      gr.Slider(
        0, max(HIGHEST_TEMPERATURE, d.temperature), 0 if d.greedy else d.temperature,
        step=0.05, label="Temperature", info="0: the most probable code",
      ),
      gr.Slider(0, most_k, min(d.top_k, most_k), step=1, label="Top k", info="0: off"),
      gr.Slider(
        min(0.05, d.top_p), 1, d.top_p, step=0.05, label="Top p", info="1: off"
      ),
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


def _examples(model: ImageModel, prompts: Sequence[str]) -> list[tuple[str, Any]]:
  """Returns labels of buttons, and the subject that each generates."""
  if model.of_captions:
    return [(prompt, prompt) for prompt in prompts]
  labels = dict.fromkeys(int(model.classes * share) for share in (0.1, 0.3, 0.5, 0.8))
  return [(_choice(model, label), label) for label in labels]


def _blank_sheet(model: ImageModel, count: int) -> str:
  return demo_html.sheet([demo_html.blank(model.size)] * count)


def _code(
  service: Service, key: str, request: gr.Request, values: Sequence[Any]
) -> list[str]:
  """Returns curl and Python for the same request, less settings at their default."""
  defaults = dataclasses.asdict(service.default_model.gpt.sampling)
  defaults |= {"n": 1, "seed": RANDOM_SEED}
  defaults |= {"size": text(service.default_model.size)}
  body = body_of(service, values)
  body = {k: v for k, v in body.items() if k not in defaults or v != defaults[k]}
  root = str(request.request.base_url).rstrip("/").removesuffix(PATH)
  return [demo_html.curl(root, body, key), demo_html.python(root, body, key)]
