"""Fields of a body -> a request, with the names of other image servers."""

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from llamagen_jax.serving.api_error import APIError, encodable, from_validation
from llamagen_jax.serving.schema import ImageRequest

R = TypeVar("R", bound=ImageRequest)

# Fields that other image servers and their clients use, and ours of that meaning.
RENAMED = {
  "batch_size": "n",
  "n_samples": "n",
  "num_images": "n",
  "num_images_per_prompt": "n",
  "num_outputs": "n",
  "samples": "n",
  "cfg": "guidance_scale",
  "cfg_scale": "guidance_scale",
  "guidance": "guidance_scale",
  "format": "output_format",
  "image_size": "size",
  "negativePrompt": "negative_prompt",
  "output_quality": "output_compression",
  "random_seed": "seed",
}


def parse_body(body: bytes, content_type: str) -> Any:
  """Returns the value that a body of JSON holds.

  Raises:
    APIError: 400 for another type or for text that is not JSON.
  """
  kind = content_type.partition(";")[0].strip().lower()
  if kind != "application/json" and not kind.endswith("+json"):
    # A page of another origin may send any other type without asking first.
    message = "the body must be a JSON object, sent as Content-Type: application/json"
    raise APIError(400, message, code="invalid_json")
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as error:
    message = f"the body is not valid JSON: {str(error)[:200]}"
    raise APIError(400, message, code="invalid_json") from error


def read_request(
  value: Any, strict: bool, kind: type[R] = ImageRequest
) -> tuple[R, list[str]]:
  """Returns a request, and warnings about its fields that were ignored.

  Args:
    value: the JSON of the body, or the fields of a form.
    strict: refuse every field that is not in the schema.
    kind: of the request.

  Raises:
    APIError: 400, which names the field.
  """
  if not isinstance(value, dict):
    message = f"the body must be a JSON object, found {type(value).__name__}"
    raise APIError(400, message, code="invalid_json")
  fields, origin, warnings = (value, {}, []) if strict else _known(value, kind)
  try:
    return kind(**fields), warnings
  except ValidationError as error:
    raise from_validation(error.errors()[0], origin) from error


def _known(
  value: dict[str, Any], kind: type[ImageRequest]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
  """Returns fields of ours, the names that renamed ones had, and warnings."""
  ours = {k: v for k, v in value.items() if k in kind.model_fields}
  fields = {k: v for k, v in ours.items() if not (k == "model" and v == "")}
  origin, warnings = {}, []
  rest = {k: v for k, v in value.items() if k not in ours and v is not None}
  width, height = rest.get("width"), rest.get("height")
  if fields.get("size") is None and type(width) is type(height) is int:
    fields["size"] = f"{width}x{height}"
    origin["size"] = "width"
    del rest["width"], rest["height"]
  for name, found in rest.items():
    field = RENAMED.get(name)
    if field is None or fields.get(field) is not None:
      warnings.append(f"'{encodable(name[:60])}' is ignored.")
      continue
    if field == "output_format" and found == "jpg":
      found = "jpeg"
    fields[field], origin[field] = found, name
  return fields, origin, warnings
