"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llamagen_jax.serving.schema import ErrorBody

TYPES = {
  401: "authentication_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "server_error",
}
CODES = {
  404: "not_found",
  405: "method_not_allowed",
  408: "request_timeout",
  413: "request_too_large",
}
CLOSING = (408, 413)  # the rest of the body is not read


class APIError(Exception):
  """A request that is answered with an error."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    retry_after: int | None = None,  # seconds
  ):
    super().__init__(message)
    self.status, self.message = status, encodable(message)
    self.code = code or CODES.get(status)
    self.param, self.retry_after = param and encodable(param), retry_after

  def body(self) -> dict[str, Any]:
    return ErrorBody.of(
      message=self.message,
      type=TYPES.get(self.status, "invalid_request_error"),
      param=self.param,
      code=self.code,
    ).model_dump()

  def body_json(self) -> str:
    return json.dumps(self.body())

  def response(self) -> JSONResponse:
    headers = {}
    if self.retry_after is not None:
      headers["Retry-After"] = str(self.retry_after)
    if self.status == 401:
      headers["WWW-Authenticate"] = "Bearer"
    if self.status in CLOSING:
      headers["Connection"] = "close"
    return JSONResponse(self.body(), self.status, headers)


def encodable(text: str) -> str:
  """JSON may hold half a surrogate pair, which no response can hold."""
  return text.encode("utf-8", "replace").decode("utf-8")


def add_handlers(app: FastAPI) -> None:
  """Answers exceptions, the framework's too, in OpenAI's shape."""

  @app.exception_handler(APIError)
  async def refused(request: Request, error: APIError):
    return error.response()

  @app.exception_handler(RequestValidationError)
  async def invalid(request: Request, error: RequestValidationError):
    first = error.errors()[0]
    return from_validation({**first, "loc": first["loc"][1:]}).response()

  @app.exception_handler(HTTPException)
  async def http_error(request: Request, error: HTTPException):
    where = f"{request.method} {request.url.path}"
    response = APIError(error.status_code, f"{where}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response


def from_validation(
  error: Mapping[str, Any], origin: Mapping[str, str] | None = None
) -> APIError:
  """Returns the error that names the field of one of pydantic's errors.

  Args:
    error: its location begins with the field.
    origin: names that fields had in the request, where it used others.
  """
  kind, message = error["type"], error["msg"]
  path = [str(key) for key in error["loc"]]
  field = path[0] if path else ""
  field = (origin or {}).get(field, field)[:60]
  if not field:  # a name that is no UTF-8
    message = "the body has a field whose name is not UTF-8"
    return APIError(400, message, code="unknown_parameter")
  if kind == "extra_forbidden":
    return APIError(
      400, f"Unknown parameter: '{field}'.", code="unknown_parameter", param=field
    )
  code = "invalid_type" if kind.endswith("_type") else "invalid_value"
  return APIError(400, f"Invalid '{field}': {message}.", code=code, param=field)
