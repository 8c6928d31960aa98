"""Server-sent events of a drawing: partial pictures, then the finished ones."""

import asyncio
from collections.abc import AsyncIterator
import contextlib

from anyio import to_thread
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from llamagen_jax.serving.protocol import Finished
from llamagen_jax.serving.refusal import Refusal
from llamagen_jax.serving.schema import Completed, Image, PartialImage
from llamagen_jax.serving.service import Drawing
from llamagen_jax.serving.store import Store
from llamagen_jax.serving.studio import Studio

PING_SECONDS = 15  # silence that proxies stand


class EventStream(StreamingResponse):
  """Events of a drawing, which ends with the connection."""

  media_type = "text/event-stream"

  def __init__(self, drawing: Drawing, studio: Studio, store: Store, root: str):
    # nginx would collect the events otherwise.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    events = _with_pings(_events(drawing, studio, store, root))
    super().__init__(events, headers=headers)
    self._drawing = drawing

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._drawing.close()


async def _events(
  drawing: Drawing, studio: Studio, store: Store, root: str
) -> AsyncIterator[bytes]:
  body = drawing.body
  style = studio.style(body)
  steps = _partial_steps(body.partial_images or 0, studio.gpt.config.image_tokens)
  sent: dict[int, int] = {}  # partial pictures of every picture
  try:
    async for index, event in drawing.news():
      if isinstance(event, Finished):
        image = await to_thread.run_sync(store.image, studio, event.picture, body, root)
        yield _event(_completed(image, index, drawing, studio, style))
        continue
      reached = sum(len(event.codes) >= step for step in steps)
      if reached > sent.get(index, 0):
        picture = await to_thread.run_sync(studio.render_partly, event.codes)
        data = await to_thread.run_sync(store.b64, studio, picture, body)
        if not sent:
          drawing.first_partial()
        yield _event(
          PartialImage(
            b64_json=data, partial_image_index=reached - 1, image_index=index, **style
          )
        )
        sent[index] = reached
  except Refusal as refusal:
    drawing.close()  # first: who hears of it may ask again at once
    yield _sse("error", refusal.body_json())


def _partial_steps(count: int, codes: int) -> list[int]:
  """Numbers of codes at which a partial picture is due."""
  return [codes * (i + 1) // (count + 1) for i in range(count)]


def _completed(
  image: Image, index: int, drawing: Drawing, studio: Studio, style: dict[str, str]
) -> Completed:
  return Completed(
    **image.model_dump(), image_index=index, usage=studio.usage(1), seed=drawing.seed,
    **style,
  )  # fmt: skip


def _event(event: BaseModel) -> bytes:
  return _sse(event.type, event.model_dump_json(exclude_none=True))


def _sse(name: str, data: str) -> bytes:
  return f"event: {name}\ndata: {data}\n\n".encode()


async def _with_pings(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
  """Comments between events that are far apart, so that nobody hangs up."""
  coming = asyncio.ensure_future(anext(events, None))
  try:
    while True:
      done, _ = await asyncio.wait([coming], timeout=PING_SECONDS)
      if not done:
        yield b": still drawing\n\n"
        continue
      event = coming.result()
      if event is None:
        return
      yield event
      coming = asyncio.ensure_future(anext(events, None))
  finally:
    coming.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await coming
