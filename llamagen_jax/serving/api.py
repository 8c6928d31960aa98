"""The HTTP server: OpenAI's images API over a slot engine.

POST /v1/images/generations   images, or a stream of events with `stream`
GET  /v1/models               the one model that is served
GET  /health  /ready          the process lives; it takes requests
GET  /metrics                 for Prometheus
"""

import asyncio
from collections.abc import AsyncIterator
import contextlib
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

import llamagen_jax
from llamagen_jax.serving.api_error import APIError, add_handlers
from llamagen_jax.serving.auth import AuthAndLimits
from llamagen_jax.serving.schema import (
  Completed,
  ErrorBody,
  ImageRequest,
  ImagesResponse,
  Model,
  ModelList,
  PartialImage,
  now,
)
from llamagen_jax.serving.service import ActiveRequest, Service
from llamagen_jax.serving.store import URL_PATH, Store
from llamagen_jax.serving.stream import EventStream

EVENTS = (PartialImage, Completed)
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 503)}
KEY_ERRORS = {status: ERRORS[status] for status in (401, 404)}
EVENT = {
  "type": "object",
  "required": ["event", "data"],
  "properties": {
    "event": {
      "enum": [*(event.model_fields["type"].default for event in EVENTS), "error"]
    },
    "data": {
      "type": "string",
      "contentMediaType": "application/json",
      "contentSchema": {
        "oneOf": [
          {"$ref": f"#/components/schemas/{event.__name__}"}
          for event in (*EVENTS, ErrorBody)
        ]
      },
    },
  },
}
GENERATED = {
  "model": ImagesResponse,
  "description": "Images, or with `stream` events PartialImage and Completed.",
  "content": {"text/event-stream": {"itemSchema": EVENT}},
}


def make_app(service: Service, store: Store, api_key: str = "") -> FastAPI:
  """The server of one model; it starts and stops the service's backend."""

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    service.backend.start()
    warming = asyncio.create_task(service.warm_up())  # /health is answered meanwhile
    yield
    warming.cancel()
    await to_thread.run_sync(service.backend.stop)

  app = FastAPI(
    title="llamagen", version=llamagen_jax.__version__, lifespan=lifespan,
    summary="Images by LlamaGen, in the API of OpenAI's images.",
  )  # fmt: skip
  add_handlers(app)
  _add_images(app, service, store)
  _add_models(app, service)
  _add_state(app, service)
  if store.folder is not None:
    app.mount(URL_PATH, StaticFiles(directory=store.folder))
  app.add_middleware(
    AuthAndLimits,
    key=api_key, largest_body=service.limits.body_bytes, metrics=service.metrics,
  )  # fmt: skip
  _describe(app, guarded=bool(api_key))
  return app


def _add_images(app: FastAPI, service: Service, store: Store) -> None:
  image_model = service.image_model

  @app.post("/v1/images/generations", responses={200: GENERATED, **ERRORS})
  async def generate_images(body: ImageRequest, request: Request) -> ImagesResponse:
    """Draws images of a prompt or a class."""
    store.check(body)
    if body.partial_images and not body.stream:
      message = "'partial_images' goes with 'stream'."
      raise APIError(400, message, code="invalid_value", param="partial_images")
    root, drawing = str(request.base_url), await service.admit(body)
    if body.stream:
      return EventStream(drawing, image_model, store, root)
    try:
      images = await _unless_gone(request, drawing)
    finally:
      drawing.close()
    images = [
      await to_thread.run_sync(store.image, image_model, image, body, root)
      for image in images
    ]
    response = ImagesResponse(
      data=images, usage=image_model.usage(len(images)), seed=drawing.seed,
      **image_model.style(body),
    )  # fmt: skip
    return JSONResponse(response.model_dump(exclude_none=True))


async def _unless_gone(request: Request, drawing: ActiveRequest) -> list[Any]:
  """The images, or an error as soon as the client hangs up."""
  drawn = asyncio.create_task(drawing.images())
  gone = asyncio.create_task(_gone(request))
  try:
    await asyncio.wait([drawn, gone], return_when=asyncio.FIRST_COMPLETED)
    if not drawn.done():
      raise APIError(499, "the client hung up")  # which nobody reads
    return drawn.result()
  finally:
    drawn.cancel()
    gone.cancel()


async def _gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _add_models(app: FastAPI, service: Service) -> None:
  name = service.image_model.name
  model = Model(id=name, created=now())

  @app.get("/v1/models", responses={401: ERRORS[401]})
  async def list_models() -> ModelList:
    """The model that this server draws with."""
    return ModelList(data=[model])

  @app.get("/v1/models/{model_id:path}", responses=KEY_ERRORS)
  async def get_model(model_id: str) -> Model:
    """The model of that name."""
    if model_id != name:
      message = f"The model '{model_id}' does not exist; this server has '{name}'."
      raise APIError(404, message, code="model_not_found", param="model")
    return model


def _add_state(app: FastAPI, service: Service) -> None:
  @app.get("/health", responses={503: {"description": "The engine has died."}})
  async def health() -> dict[str, str]:
    """Whether the process is worth keeping: 503 after its engine has died."""
    return _state(service.alive, "alive", "dead")

  @app.get("/ready", responses={503: {"description": "Compiling, or draining."}})
  async def ready() -> dict[str, str]:
    """Whether to send requests: 200 after warm-up, until shutdown."""
    return _state(service.ready, "ready", "not ready")

  @app.get("/metrics", response_class=Response)
  async def metrics() -> Response:
    """Counters in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _state(good: bool, yes: str, no: str) -> JSONResponse:
  return JSONResponse({"status": yes if good else no}, 200 if good else 503)


def _describe(app: FastAPI, guarded: bool) -> None:
  """Puts events, errors and the key into the OpenAPI document."""
  spec = app.openapi()
  schemas = spec["components"]["schemas"]
  for event in EVENTS:
    schemas[event.__name__] = event.model_json_schema(
      ref_template="#/components/schemas/{model}"
    )
    schemas |= schemas[event.__name__].pop("$defs", {})
  for path, methods in spec["paths"].items():
    for operation in methods.values():
      operation["responses"].pop("422", None)  # answered with 400
      if guarded and path.startswith("/v1"):
        operation["security"] = [{"key": []}]
  if guarded:
    key = {"type": "http", "scheme": "bearer"}
    spec["components"]["securitySchemes"] = {"key": key}
