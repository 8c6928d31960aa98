"""The parts of the demo that are plain HTML and text: images, status, code to copy."""

import base64
from collections.abc import Sequence
import html
import io
import json
import shlex
from typing import Any

import numpy as np
from PIL import Image

FINISHED, UNFINISHED = ("PNG", {}), ("WEBP", {"quality": 70})  # the latter sent often

# All images of a request are there from the start and keep their size, so that nothing
# moves; the status stays in sight above them.
CSS = """
.gradio-container { width: 100%; max-width: 76rem !important; margin: auto; }
#heading h1 { font-size: 1.6rem; letter-spacing: -0.02em; margin: 0 0 0.2rem; }
#heading p { color: var(--body-text-color-subdued); margin: 0; }
#examples { flex-wrap: wrap; gap: 0.4rem; }
#examples button { flex: 0 1 auto; min-width: 0; }
#editor { overflow: hidden; }
#status .html-container, #images .html-container { padding: 0 !important; }
#status { position: sticky; top: 0; z-index: 5; padding: 0.5rem 0;
  background: var(--body-background-fill); }
.status { display: flex; gap: 0.8rem; align-items: center; min-height: 1.6rem; }
.status progress { flex: 1; height: 0.5rem; appearance: none; border: 0;
  background: var(--border-color-primary); border-radius: 0.25rem; overflow: hidden; }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
.status.error { color: var(--error-text-color, #b91c1c); }
.sheet { display: grid; gap: 0.75rem; grid-template-columns: 1fr 1fr; }
.sheet.one { grid-template-columns: minmax(0, 30rem); }
.sheet.many { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.sheet figure { margin: 0; }
.sheet .frame { width: 100%; display: block; border-radius: 0.5rem; overflow: hidden;
  background: var(--border-color-primary); }
.sheet .frame img { width: 100%; height: 100%; display: block; margin: 0;
  object-fit: cover; }
.sheet .frame img.small { image-rendering: pixelated; }
.sheet figcaption { display: flex; justify-content: space-between; gap: 0.5rem;
  height: 1.8rem; align-items: center; font-size: 0.8rem; white-space: nowrap;
  color: var(--body-text-color-subdued); }
#images figcaption :is(a, button) { color: var(--color-accent);
  font: 600 0.8rem system-ui; padding: 0.3rem; text-decoration: none; }
#images figcaption button { background: none; border: 0; margin: 0; box-shadow: none; }
#images figcaption :is(a, button):hover { text-decoration: underline; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 0.75rem !important; }
  .sheet.many { grid-template-columns: 1fr 1fr; }
}
"""
# A click on a figure's button -> an event with the number of its image.
TELL_WHICH_TO_VARY = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-image]");
  if (button) trigger("click", {image: Number(button.dataset.image)});
});
"""
SMALL = 128  # pixels, below which an upscaled image shows its pixels


def sheet(figures: Sequence[str]) -> str:
  """Returns all images of a request."""
  kind = {1: "one", 2: "few", 3: "few", 4: "few"}.get(len(figures), "many")
  return f'<div class="sheet {kind}">{"".join(figures)}</div>'


def blank(size: tuple[int, int], note: str = "") -> str:
  """Returns the frame of an image that has not begun."""
  return _figure(size, "", f"<span>{html.escape(note)}</span>")


def unfinished(image: np.ndarray, alt: str, percent: int) -> str:
  """Returns an image, uint8 [H, W, 3], whose codes are still coming."""
  size = image.shape[1], image.shape[0]
  alt = f"{alt}, {percent} percent done"
  return _figure(size, _img(image, alt, UNFINISHED), f"<span>{percent} %</span>")


def finished(image: np.ndarray, alt: str, name: str, number: int | None) -> str:
  """Returns an image, uint8 [H, W, 3], that a click downloads under its name.

  With a number there is a button that asks for variations of the image.

  The pixels are in the page itself: a file behind it would be written while the browser
  reads it, because an image changes many times a second.
  """
  name = html.escape(name)
  url = _data_url(image, FINISHED)
  link = f'<a download="{name}" href="{url}" aria-label="Download {name}">Download</a>'
  vary = "<span>Done</span>"
  if number is not None:
    vary = (
      f'<button type="button" data-image="{number}" aria-label="Vary image'
      f' {number + 1}">Vary</button>'
    )
  size = image.shape[1], image.shape[0]
  return _figure(size, _img(image, alt, FINISHED), vary + link)


def status(text: str, share: float | None = None, error: bool = False) -> str:
  """Returns the line above the images, with a bar for the share that is done."""
  bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
  role, kind = ("alert", "status error") if error else ("status", "status")
  return (
    f'<div class="{kind}" role="{role}"><span>{html.escape(text)}</span>{bar}</div>'
  )


def curl(root: str, body: dict[str, Any], key: str) -> str:
  """Returns the command that asks for the same; `key` names a variable, or is ""."""
  header = f' -H "Authorization: Bearer ${key}" \\\n ' if key else ""
  return (
    f"curl {root}/v1/images/generations \\\n "
    f" -H 'Content-Type: application/json' \\\n {header}"
    f" -d {shlex.quote(json.dumps(body))}"
  )


def python(root: str, body: dict[str, Any], key: str) -> str:
  """Returns the lines for OpenAI's client that ask for the same."""
  known = {k: v for k, v in body.items() if k in ("prompt", "n", "size")}
  extra = {k: v for k, v in body.items() if k not in known}
  known.setdefault("prompt", "")
  secret = f'os.environ["{key}"]' if key else '"none"'
  arguments = "".join(f"  {k}={v!r},\n" for k, v in known.items())
  if extra:
    arguments += f"  extra_body={extra!r},\n"
  return (
    "import base64\n" + ("import os\n" if key else "") + "import openai\n\n"
    f'client = openai.OpenAI(base_url="{root}/v1", api_key={secret})\n'
    f"response = client.images.generate(\n{arguments})\n"
    "for i, image in enumerate(response.data):\n"
    '  with open(f"{i}.png", "wb") as file:\n'
    "    file.write(base64.b64decode(image.b64_json))"
  )


def _figure(size: tuple[int, int], inside: str, caption: str) -> str:
  frame = f'<div class="frame" style="aspect-ratio:{size[0]}/{size[1]}">{inside}</div>'
  return f"<figure>{frame}<figcaption>{caption}</figcaption></figure>"


def _img(image: np.ndarray, alt: str, form: tuple[str, dict[str, int]]) -> str:
  kind = "small" if image.shape[1] < SMALL else ""
  return f'<img class="{kind}" alt="{html.escape(alt)}" src="{_data_url(image, form)}">'


def _data_url(image: np.ndarray, form: tuple[str, dict[str, int]]) -> str:
  kind, options = form
  file = io.BytesIO()
  Image.fromarray(image).save(file, format=kind, **options)
  data = base64.b64encode(file.getvalue()).decode()
  return f"data:image/{kind.lower()};base64,{data}"
