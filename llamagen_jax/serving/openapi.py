"""The OpenAPI document: events, errors, and the limits of this server's models."""

from typing import Any, get_args

from fastapi import FastAPI

from llamagen_jax.serving.schema import (
  Completed,
  EditRequest,
  ErrorBody,
  ImageRequest,
  ImagesResponse,
  PartialImage,
)
from llamagen_jax.serving.service import Service

EVENTS = (PartialImage, Completed)
REFERENCE = "#/components/schemas/{model}"
ERRORS = {
  status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 415, 429, 503)
}
KEY_ERRORS = {status: ERRORS[status] for status in (401, 404)}
# The schema of a stream is that of each of its events.
EVENT = {
  "type": "object",
  "required": ["event", "data"],
  "properties": {
    "event": {
      "enum": [
        *(
          n for event in EVENTS for n in get_args(event.model_fields["type"].annotation)
        ),
        "error",
      ]
    },
    "data": {
      "type": "string",
      "contentMediaType": "application/json",
      "contentSchema": {
        "oneOf": [
          {"$ref": REFERENCE.format(model=model.__name__)}
          for model in (*EVENTS, ErrorBody)
        ]
      },
    },
  },
}
GENERATED = {
  "model": ImagesResponse,
  "description": "Images, or with `stream` events PartialImage and Completed.",
  "content": {"text/event-stream": {"schema": EVENT}},
}
BODY = {
  "required": True,
  "content": {
    "application/json": {"schema": {"$ref": REFERENCE.format(model="ImageRequest")}}
  },
}
FORM = {
  "required": True,
  "content": {
    "multipart/form-data": {"schema": {"$ref": REFERENCE.format(model="EditForm")}}
  },
}
FILE = {"type": "string", "format": "binary"}


def describe(app: FastAPI, service: Service) -> None:
  """Completes the document that FastAPI has made of the routes."""
  spec = app.openapi()
  schemas = spec["components"]["schemas"]
  for model in (*EVENTS, ImageRequest):
    schema = model.model_json_schema(ref_template=REFERENCE)
    schemas |= schema.pop("$defs", {})
    schemas[model.__name__] = schema
  form = schemas["EditForm"] = EditRequest.model_json_schema(ref_template=REFERENCE)
  form["properties"] |= {"image": FILE, "mask": FILE}
  form["required"] = ["image"]
  for name in ("ImageRequest", "EditForm"):
    _set_limits(schemas[name], service)
  for methods in spec["paths"].values():
    for operation in methods.values():
      operation["responses"].pop("422", None)  # answered with 400


def _set_limits(schema: dict[str, Any], service: Service) -> None:
  """Puts the limits of this server into the schema of `ImageRequest`."""
  images = max(map(service.most_images, service.models.values()))
  fields = schema["properties"]
  _integer(fields["n"])["maximum"] = images
  array = next(o for o in fields["class_labels"]["anyOf"] if o["type"] == "array")
  array["maxItems"] = images
  classes = max(model.classes for model in service.models.values())
  if classes:
    for options in (fields["class_label"], array["items"]):
      _integer(options)["maximum"] = classes - 1
  # Other fields are ignored, unless the server is strict.
  schema["additionalProperties"] = not service.limits.strict


def _integer(field: dict[str, Any]) -> dict[str, Any]:
  return next(option for option in field["anyOf"] if option["type"] == "integer")
