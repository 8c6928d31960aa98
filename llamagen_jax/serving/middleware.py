"""ASGI middleware: the frame around every request, and the limits of its body.

The frame gives a request its id, honours a proxy's headers, answers HEAD and paths that
end with a slash as clients expect, turns a crash into an error of OpenAI's shape, and
counts and logs the response.
"""

import asyncio
from collections.abc import Mapping
import json
import logging
import re
import time
import urllib.parse
import uuid
import zlib

from absl import logging as absl_logging
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.metrics import Metrics

REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
HOST = re.compile(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?")
PREFIX = re.compile(r"(/[\w.~-]+)+")
FORWARDED = (b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-prefix")
EXACT = ("/health", "/ready", "/metrics")  # and everything below /v1
UNLOGGED = ("/demo/", "/static-offline-docs/")  # dozens of files a page
ANY_ENCODING = 32 + zlib.MAX_WBITS  # gzip or zlib, by their headers

access_log = logging.getLogger("llamagen.access")


class RequestFrame:
  """ASGI middleware around all others. See the module's docstring."""

  def __init__(self, app: ASGIApp, metrics: Metrics, public_url: str = ""):
    self._app, self._metrics = app, metrics
    self._public_url = urllib.parse.urlsplit(public_url) if public_url else None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    started, headers = time.monotonic(), Headers(scope=scope)
    given = headers.get("x-request-id", "")
    request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    scope = self._inner_scope(scope, headers, request_id)
    status = 0

    async def framed_send(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        MutableHeaders(scope=message)["X-Request-ID"] = request_id
      await send(message)

    try:
      await self._app(scope, receive, framed_send)
    except Exception:
      absl_logging.exception("request %s failed", request_id)
      if status:  # too late for another answer
        raise
      error = APIError(500, f"The server failed on this request, {request_id}.")
      await error.response()(scope, receive, framed_send)
    finally:
      path = getattr(scope.get("route"), "path", "other")
      self._metrics.responses.labels(path, status).inc()
      if not scope["path"].removeprefix(scope["root_path"]).startswith(UNLOGGED):
        self._log(scope, request_id, status, time.monotonic() - started)

  def _inner_scope(self, scope: Scope, headers: Headers, request_id: str) -> Scope:
    """Returns the scope that the routes see."""
    scope = scope | {"state": {**scope.get("state", {}), "request_id": request_id}}
    if scope["method"] == "HEAD":
      scope["method"] = "GET"  # uvicorn leaves the body out
    scheme, host, prefix = self._public(headers)
    if scheme in ("http", "https"):
      scope["scheme"] = scheme
    # The routes, and the demo's, find all that a proxy said in the scope itself.
    others = [(k, v) for k, v in scope["headers"] if k not in FORWARDED]
    if HOST.fullmatch(host):
      others = [(b"host", host.encode()), *((k, v) for k, v in others if k != b"host")]
    scope["headers"] = others
    if not PREFIX.fullmatch(prefix):
      prefix = scope["root_path"]
    path = re.sub(r"/{2,}", "/", scope["path"])
    if path.startswith(f"{prefix}/"):  # a proxy may have taken it away, or not
      path = path.removeprefix(prefix)
    if path.startswith("/v1/") or path.rstrip("/") in EXACT:
      path = path.rstrip("/")
    scope |= {"root_path": prefix, "path": prefix + path}  # as ASGI wants them
    return scope

  def _public(self, headers: Headers) -> tuple[str, str, str]:
    """Returns scheme, host and path below which clients reach the server."""
    if self._public_url is not None:
      url = self._public_url
      return url.scheme, url.netloc, url.path.rstrip("/")
    scheme, host, prefix = (
      headers.get(f"x-forwarded-{name}", "").partition(",")[0].strip()
      for name in ("proto", "host", "prefix")
    )
    return scheme, host, prefix.rstrip("/")

  def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
    fields = {
      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "request_id": request_id,
      "client": (scope.get("client") or ["-"])[0],
      "method": scope["method"],
      "path": scope["path"].removeprefix(scope["root_path"]),
      "status": status or 499,  # nginx's number for a client that went away
      "seconds": round(seconds, 4),
      **scope["state"].get("log", {}),
    }
    access_log.info("%s", json.dumps(fields))


class BodyLimits:
  """ASGI middleware: size and time of a body, and its compression."""

  def __init__(
    self, app: ASGIApp, largest: int, seconds: float, uploads: Mapping[str, int] = {}
  ):
    """Wraps an app.

    Args:
      app: the app inside.
      largest: bytes of a body.
      seconds: until it must be there.
      uploads: other bytes for some paths.
    """
    self._app, self._seconds = app, seconds
    self._largest, self._uploads = largest, uploads

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    headers = Headers(scope=scope)
    path = scope["path"].removeprefix(scope["root_path"])
    largest = self._uploads.get(path, self._largest)
    length = headers.get("content-length", "0")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if length.isdigit() and int(length) > largest:
      await _too_large(largest).response()(scope, receive, send)
    elif encoding not in ("identity", "gzip", "x-gzip", "deflate"):
      message = f"Content-Encoding {encoding[:40]!r}: expected gzip or deflate."
      error = APIError(415, message, code="unsupported_encoding")
      await error.response()(scope, receive, send)
    else:
      inflate = None if encoding == "identity" else zlib.decompressobj(ANY_ENCODING)
      await self._app(scope, self._limited(receive, inflate, largest), send)

  def _limited(self, receive: Receive, inflate, largest: int) -> Receive:
    """Returns a `receive` that inflates, and raises when a body is over its limits."""
    seen, complete, end = 0, False, time.monotonic() + self._seconds

    async def limited() -> Message:
      nonlocal seen, complete
      if complete:
        return await receive()
      try:
        async with asyncio.timeout(max(0.0, end - time.monotonic())):
          message = await receive()
      except TimeoutError:
        text = f"The body was not there after {self._seconds:g} s."
        raise HTTPException(408, text) from None
      complete = not message.get("more_body", False)
      if inflate is not None and message["type"] == "http.request":
        message = message | {"body": _inflated(inflate, message["body"], largest)}
      seen += len(message.get("body", b""))
      if seen > largest:
        raise HTTPException(413, _too_large(largest).message)
      return message

    return limited


def _inflated(inflate, data: bytes, largest: int) -> bytes:
  try:
    return inflate.decompress(data, largest + 1)
  except zlib.error as error:
    text = f"The body is not what its Content-Encoding says: {error}."
    raise HTTPException(400, text) from error


def _too_large(largest: int) -> APIError:
  return APIError(413, f"The body is larger than {largest} bytes.")
