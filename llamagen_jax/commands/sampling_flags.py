"""The fields of `SamplingConfig` as flags that override a bundle's own settings."""

import dataclasses
from typing import Any

from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.options import option


def _override(field: dataclasses.Field) -> tuple[str, Any, Any]:
  """Returns the field of an override: the same flag, not given by default."""
  m = field.metadata
  return (
    field.name,
    field.type | None,
    option(m["help"], None, unit=m["unit"], choices=m["choices"]),
  )


# A flag that is not given leaves the setting of the bundle in force.
SamplingOverrides = dataclasses.make_dataclass(
  "SamplingOverrides",
  [_override(field) for field in dataclasses.fields(SamplingConfig)],
  namespace={"__doc__": "Sampling; by default as the bundle says."},
  frozen=True,
  kw_only=True,
)


def given(options: Any) -> dict[str, Any]:
  """Returns the fields of `SamplingConfig` that the command line names."""
  values = {
    f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingConfig)
  }
  return {name: value for name, value in values.items() if value is not None}
