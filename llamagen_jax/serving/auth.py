"""What happens to a request before any route sees it: key, size of the body, counts."""

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.metrics import Metrics

GUARDED = "/v1"  # needs the key; what tells of health does not


class AuthAndLimits:
  """ASGI middleware. Checks the key before it reads a byte of the body."""

  def __init__(self, app: ASGIApp, key: str, largest_body: int, metrics: Metrics):
    self._app, self._key, self._metrics = app, key.encode(), metrics
    self._largest_body = largest_body

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def counting_send(message: Message) -> None:
      if message["type"] == "http.response.start":
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.responses.labels(path, message["status"]).inc()
      await send(message)

    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if error := self._unauthorized(scope["path"], headers.get(b"authorization")):
      await error.response()(scope, receive, counting_send)
    elif length.isdigit() and int(length) > self._largest_body:
      await self._too_large().response()(scope, receive, counting_send)
    else:
      await self._app(scope, self._limited(receive), counting_send)

  def _unauthorized(self, path: str, header: bytes | None) -> APIError | None:
    if not self._key or not path.startswith(GUARDED):
      return None
    scheme, _, key = (header or b"").partition(b" ")
    if not key.strip() or scheme.lower() != b"bearer":
      message = "You didn't provide an API key: send 'Authorization: Bearer KEY'."
      return APIError(401, message, code="missing_api_key")
    if not hmac.compare_digest(key.strip(), self._key):
      return APIError(401, "Incorrect API key provided.", code="invalid_api_key")
    return None

  def _too_large(self) -> APIError:
    return APIError(413, f"The body is larger than {self._largest_body} bytes.")

  def _limited(self, receive: Receive) -> Receive:
    """Counts the bytes of a body that did not tell its length."""
    seen = 0

    async def limited() -> Message:
      nonlocal seen
      message = await receive()
      seen += len(message.get("body", b""))
      if seen > self._largest_body:
        raise HTTPException(413, self._too_large().message)
      return message

    return limited
