"""The key of the /v1 routes, as `Authorization: Bearer KEY` or as `api-key: KEY`."""

from collections.abc import Callable
import hmac
from typing import Annotated

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from llamagen_jax.serving.api_error import APIError

KEY = "LLAMAGEN_API_KEY"  # the variable; a flag would be seen in the list of processes

_bearer = HTTPBearer(auto_error=False)
_api_key = APIKeyHeader(name="api-key", auto_error=False)
_x_api_key = APIKeyHeader(name="x-api-key", scheme_name="x-api-key", auto_error=False)


def key_check(expected: str) -> Callable[..., None]:
  """Returns a dependency that raises 401 unless a request has the key."""

  def check_key(
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
    x_api_key: Annotated[str | None, Depends(_x_api_key)],
  ) -> None:
    given = (bearer and bearer.credentials) or api_key or x_api_key or ""
    if not given.strip():
      message = "You didn't provide an API key: send 'Authorization: Bearer KEY'."
      raise APIError(401, message, code="missing_api_key")
    # Headers are decoded as latin-1, which any byte survives.
    if not hmac.compare_digest(given.strip().encode("latin-1", "replace"), key):
      raise APIError(401, "Incorrect API key provided.", code="invalid_api_key")

  key = expected.encode()
  return check_key
