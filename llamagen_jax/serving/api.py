"""The HTTP server: OpenAI's images API over slot engines.

POST /v1/images/generations   images, or a stream of events with `stream`
POST /v1/images/edits         the same of a form with an image and a mask
POST /v1/images/variations    the same of a form with an image
GET  /v1/models               the models that are served; /v1/models/NAME: one of them
GET  /images/NAME             a finished image that a response gave the URL of
GET  /health  /ready          the process lives; it takes requests
GET  /metrics                 for Prometheus
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

import llamagen_jax
from llamagen_jax.serving import openapi
from llamagen_jax.serving.api_error import APIError, add_handlers
from llamagen_jax.serving.auth import key_check
from llamagen_jax.serving.image_model import ImageModel
from llamagen_jax.serving.middleware import BodyLimits, RequestFrame
from llamagen_jax.serving.request_body import parse_body, read_request
from llamagen_jax.serving.responses import EventStream, images_response
from llamagen_jax.serving.schema import (
  EditRequest,
  ImageRequest,
  ImagesResponse,
  Model,
  ModelList,
  VariationRequest,
  now,
)
from llamagen_jax.serving.service import ActiveRequest, Service
from llamagen_jax.serving.sizes import text
from llamagen_jax.serving.store import (
  NAME,
  URL_PATH,
  MemoryStore,
  Store,
  sweep_for_ever,
)
from llamagen_jax.serving.upload import Upload, read_form

BODY_SECONDS = 30.0
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
UPLOADS = (EDITS, VARIATIONS, "/demo/gradio_api/upload")  # bodies that hold images
IMAGE_HEADERS = {"Cache-Control": "private, max-age=3600"}
SHOWN_HEADERS = ("x-request-id", "retry-after")  # to pages of other origins


def make_app(
  service: Service,
  store: Store | None = None,
  *,
  api_key: str = "",
  public_url: str = "",
  cors_origins: Sequence[str] = (),
  body_seconds: float = BODY_SECONDS,
) -> FastAPI:
  """Returns the app of a service; it starts and stops the service's workers.

  Args:
    service: of one model or more.
    store: keeps images that have a URL; None = in memory, for an hour.
    api_key: requests to /v1 need it; "" = anybody may ask.
    public_url: where clients reach the server, if a proxy does not say so.
    cors_origins: of the web pages that may ask, or "*".
    body_seconds: until the body of a request must be there.
  """
  store = MemoryStore() if store is None else store
  app = FastAPIOffline(
    title="llamagen", version=llamagen_jax.__version__,
    lifespan=lambda app: _running(service, store), redirect_slashes=False,
    summary="Images by LlamaGen, in the API of OpenAI's images.",
  )  # fmt: skip
  add_handlers(app)
  checks = [Depends(key_check(api_key))] if api_key else []
  v1 = APIRouter(prefix="/v1", dependencies=checks)
  _add_generations(v1, service, store)
  if service.limits.upload_bytes:
    _add_edits(v1, service, store)
  _add_models(v1, service)
  app.include_router(v1)
  _add_files(app, store)
  _add_state(app, service)
  uploads = service.limits.upload_bytes
  # The last one added is the outermost.
  app.add_middleware(
    BodyLimits, largest=service.limits.body_bytes, seconds=body_seconds,
    uploads=dict.fromkeys(UPLOADS, uploads) if uploads else {},
  )  # fmt: skip
  if cors_origins:
    app.add_middleware(
      CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"],
      allow_headers=["*"], expose_headers=SHOWN_HEADERS,
    )  # fmt: skip
  app.add_middleware(RequestFrame, metrics=service.metrics, public_url=public_url)
  openapi.describe(app, service)
  return app


@contextlib.asynccontextmanager
async def _running(service: Service, store: Store) -> AsyncIterator[None]:
  """Runs the workers, and what else goes on beside requests."""
  service.start()
  tasks = [
    asyncio.create_task(service.warm_up()),  # /health is answered meanwhile
    asyncio.create_task(sweep_for_ever(store)),
  ]
  try:
    yield
  finally:
    for task in tasks:
      task.cancel()
    await to_thread.run_sync(service.stop)


def _add_generations(v1: APIRouter, service: Service, store: Store) -> None:
  async def read_body(request: Request) -> tuple[ImageRequest, list[str]]:
    """Returns the request, and warnings; after the key was checked."""
    content_type = request.headers.get("content-type", "")
    value = parse_body(await request.body(), content_type)
    return read_request(value, service.limits.strict)

  @v1.post(
    "/images/generations",
    responses={200: openapi.GENERATED, **openapi.ERRORS},
    openapi_extra={"requestBody": openapi.BODY},
  )
  async def generate_images(
    request: Request, read: Annotated[Any, Depends(read_body)]
  ) -> ImagesResponse:
    """Generates images of a prompt or a class."""
    return await _respond(request, await service.admit(*read), store)


def _add_edits(v1: APIRouter, service: Service, store: Store) -> None:
  def reader(kind: type[EditRequest]):
    async def read(request: Request) -> tuple[EditRequest, list[str], Upload]:
      fields, upload, ignored = await read_form(request)
      body, warnings = read_request(fields, service.limits.strict, kind)
      return body, [*ignored, *warnings], upload

    return read

  described = {
    "responses": {200: openapi.GENERATED, **openapi.ERRORS},
    "openapi_extra": {"requestBody": openapi.FORM},
  }

  @v1.post(EDITS.removeprefix("/v1"), **described)
  async def edit_images(
    request: Request, read: Annotated[Any, Depends(reader(EditRequest))]
  ) -> ImagesResponse:
    """Draws the transparent part of an image, or of its mask, anew."""
    return await _respond(request, await service.admit(*read), store)

  @v1.post(VARIATIONS.removeprefix("/v1"), **described)
  async def vary_images(
    request: Request, read: Annotated[Any, Depends(reader(VariationRequest))]
  ) -> ImagesResponse:
    """Draws variations of an image, of a class or of none."""
    return await _respond(request, await service.admit(*read), store)


async def _respond(request: Request, active: ActiveRequest, store: Store) -> Response:
  """Returns the images of an admitted request, or a stream of them."""
  body, root = active.body, str(request.base_url)
  request.state.log = {
    "model": active.model.name, "images": body.count, "stream": bool(body.stream),
  }  # fmt: skip
  if body.stream:
    return EventStream(active, store, root)
  try:
    images = await _unless_gone(request, active)
  finally:
    active.close()
  response = await to_thread.run_sync(images_response, active, images, store, root)
  return JSONResponse(response.model_dump(exclude_none=True))


async def _unless_gone(request: Request, active: ActiveRequest) -> list[Any]:
  """Returns the images, or raises as soon as the client hangs up."""
  images = asyncio.create_task(active.images())
  gone = asyncio.create_task(_gone(request))
  try:
    await asyncio.wait([images, gone], return_when=asyncio.FIRST_COMPLETED)
    if not images.done():
      raise APIError(499, "the client hung up")  # which nobody reads
    return images.result()
  finally:
    images.cancel()
    gone.cancel()


async def _gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _add_models(v1: APIRouter, service: Service) -> None:
  created = now()

  def described(model: ImageModel) -> Model:
    first = model is service.default_model
    return Model(
      id=model.name, created=created, size=text(model.size),
      sizes=list(map(text, service.sizes(model))),
      condition=model.gpt.config.condition, classes=model.classes or None,
      aliases=list(service.limits.aliases) if first else [],
    )  # fmt: skip

  @v1.get("/models", responses={401: openapi.ERRORS[401]})
  async def list_models() -> ModelList:
    """The models of this server; the first one is the default."""
    return ModelList(data=[described(m) for m in service.models.values()])

  @v1.get("/models/{model_id:path}", responses=openapi.KEY_ERRORS)
  async def get_model(model_id: str) -> Model:
    """The model of that name or alias."""
    return described(service.model(model_id))


def _add_files(app: FastAPI, store: Store) -> None:
  @app.get(f"{URL_PATH}/{{name}}", response_class=Response, responses={
    200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}},
    404: openapi.ERRORS[404],
  })  # fmt: skip
  async def get_image(name: str) -> Response:
    """A finished image."""
    data = None
    if match := NAME.fullmatch(name):
      data = await to_thread.run_sync(store.get, name)
    if data is None:
      raise APIError(404, "There is no such image, or not any more.")
    return Response(data, media_type=f"image/{match[1]}", headers=IMAGE_HEADERS)


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
