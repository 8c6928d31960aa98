"""Images of an active request -> JSON, or server-sent events."""

import base64
from collections.abc import AsyncIterator

from anyio import to_thread
import numpy as np
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.image_model import encode_image
from llamagen_jax.serving.schema import (
  Completed,
  EditRequest,
  Image,
  ImagesResponse,
  PartialImage,
)
from llamagen_jax.serving.service import ActiveRequest
from llamagen_jax.serving.store import Store
from llamagen_jax.serving.worker import Finished

PING_SECONDS = 15  # of silence, after which a comment keeps proxies from hanging up
SEND_SECONDS = 60  # that a client may leave an event unread

# Streams end when their images are done, also while the server drains.
AppStatus.disable_automatic_graceful_drain()


def images_response(
  active: ActiveRequest, images: list[np.ndarray], store: Store, root: str
) -> ImagesResponse:
  """Returns the response with all images, uint8 [H, W, 3]."""
  return ImagesResponse(
    data=[_image(active, image, store, root) for image in images],
    usage=active.model.usage(active.requests),
    seed=active.seed,
    warnings=active.warnings,
    **active.style.model_dump(),
  )


class EventStream(EventSourceResponse):
  """The events of a request, which ends with the connection."""

  def __init__(self, active: ActiveRequest, store: Store, root: str):
    super().__init__(
      _events(active, store, root),
      sep="\n", ping=PING_SECONDS, send_timeout=SEND_SECONDS,
      ping_message_factory=lambda: ServerSentEvent(comment="still generating"),
    )  # fmt: skip
    self._active = active

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:  # also when the client has gone before the first event
      self._active.close()


async def _events(
  active: ActiveRequest, store: Store, root: str
) -> AsyncIterator[ServerSentEvent]:
  partial = active.body.partial_images or 0
  steps = _partial_steps(partial, active.model.gpt.config.image_tokens)
  sent: dict[int, int] = {}  # partial images of every image
  try:
    async for index, event in active.events():
      if isinstance(event, Finished):
        image = await to_thread.run_sync(_image, active, event.image, store, root)
        yield _event(_completed(active, image, index))
        continue
      reached = sum(len(event.codes) >= step for step in steps)
      if reached > sent.get(index, 0):
        data = await to_thread.run_sync(_partial_b64, active, event.codes)
        if not sent:
          active.first_partial()
        sent[index] = reached
        yield _event(
          PartialImage(
            type=_kind(active, "partial_image"),
            b64_json=data,
            partial_image_index=reached - 1,
            image_index=index,
            **active.style.model_dump(),
          )  # fmt: skip
        )
  except APIError as error:
    active.close()  # first: who hears of it may ask again at once
    yield ServerSentEvent(error.body_json(), event="error", sep="\n")


def _image(active: ActiveRequest, image: np.ndarray, store: Store, root: str) -> Image:
  """uint8 [H, W, 3] -> base64, a URL below the server's `root`, or both."""
  body = active.body
  data = encode_image(image, body, active.size)
  b64 = base64.b64encode(data).decode()
  if body.response_format == "b64_json":
    return Image(b64_json=b64)
  url = store.save(data, active.style.output_format, root)
  return Image(url=url, b64_json=None if body.response_format == "url" else b64)


def _partial_b64(active: ActiveRequest, codes: np.ndarray) -> str:
  image = active.model.render_partly(codes)
  return base64.b64encode(encode_image(image, active.body, active.size)).decode()


def _partial_steps(count: int, codes: int) -> list[int]:
  """Returns the numbers of codes at which a partial image is due."""
  return [codes * (i + 1) // (count + 1) for i in range(count)]


def _completed(active: ActiveRequest, image: Image, index: int) -> Completed:
  return Completed(
    type=_kind(active, "completed"),
    **image.model_dump(),
    image_index=index,
    usage=active.model.usage([active.requests[index]]),
    seed=active.seed,
    warnings=active.warnings,
    **active.style.model_dump(),
  )


def _kind(active: ActiveRequest, event: str) -> str:
  edits = isinstance(active.body, EditRequest)
  return f"image_{'edit' if edits else 'generation'}.{event}"


def _event(event: BaseModel) -> ServerSentEvent:
  return ServerSentEvent(
    event.model_dump_json(exclude_none=True), event=event.type, sep="\n"
  )
