"""Server-sent events of a drawing: partial images, then the finished ones."""

import asyncio
from collections.abc import AsyncIterator
import contextlib

from anyio import to_thread
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.protocol import Finished
from llamagen_jax.serving.schema import Completed, Image, PartialImage
from llamagen_jax.serving.service import ActiveRequest
from llamagen_jax.serving.store import Store

PING_SECONDS = 15  # silence that proxies stand


class EventStream(StreamingResponse):
  """Events of a drawing, which ends with the connection."""

  media_type = "text/event-stream"

  def __init__(
    self, drawing: ActiveRequest, image_model: ImageModel, store: Store, root: str
  ):
    # nginx would collect the events otherwise.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    events = _with_pings(_events(drawing, image_model, store, root))
    super().__init__(events, headers=headers)
    self._drawing = drawing

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._drawing.close()


async def _events(
  drawing: ActiveRequest, image_model: ImageModel, store: Store, root: str
) -> AsyncIterator[bytes]:
  body = drawing.body
  style = image_model.style(body)
  steps = _partial_steps(body.partial_images or 0, image_model.gpt.config.image_tokens)
  sent: dict[int, int] = {}  # partial images of every image
  try:
    async for index, event in drawing.events():
      if isinstance(event, Finished):
        image = await to_thread.run_sync(
          store.image, image_model, event.image, body, root
        )
        yield _event(_completed(image, index, drawing, image_model, style))
        continue
      reached = sum(len(event.codes) >= step for step in steps)
      if reached > sent.get(index, 0):
        image = await to_thread.run_sync(image_model.render_partly, event.codes)
        data = await to_thread.run_sync(store.b64, image_model, image, body)
        if not sent:
          drawing.first_partial()
        yield _event(
          PartialImage(
            b64_json=data, partial_image_index=reached - 1, image_index=index, **style
          )
        )
        sent[index] = reached
  except APIError as error:
    drawing.close()  # first: who hears of it may ask again at once
    yield _sse("error", error.body_json())


def _partial_steps(count: int, codes: int) -> list[int]:
  """Numbers of codes at which a partial image is due."""
  return [codes * (i + 1) // (count + 1) for i in range(count)]


def _completed(
  image: Image,
  index: int,
  drawing: ActiveRequest,
  image_model: ImageModel,
  style: dict[str, str],
) -> Completed:
  return Completed(
    **image.model_dump(),
    image_index=index,
    usage=image_model.usage(1),
    seed=drawing.seed,
    **style,
  )


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
