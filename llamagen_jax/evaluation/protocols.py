"""Named protocols: which reference belongs to a score, and what makes it comparable."""

import dataclasses
from typing import Any

import numpy as np

from llamagen_jax.evaluation.sources import Source
from llamagen_jax.gpt.config import PRESETS
from llamagen_jax.interop.published import PUBLISHED


@dataclasses.dataclass(frozen=True)
class Protocol:
  """What a score of this name is made of."""

  about: str
  samples: int | None = None  # pictures that are scored
  side: int | None = None  # of samples and references
  reference_pictures: int | None = None  # in the reference
  reference_statistics: bool | None = None  # it brings its own mean and covariance
  same_order: bool = False  # sample i is made of reference i
  fid_name: str = "FID"  # among the published scores
  metrics: tuple[str, ...] = ("FID", "sFID", "IS", "precision", "recall")


PROTOCOLS = {
  "gfid-adm-imagenet256": Protocol(
    "50 000 samples against VIRTUAL_imagenet256_labeled.npz, as ADM and LlamaGen",
    50_000, 256, 10_000, True,
  ),
  "rfid-imagenet256": Protocol(
    "reconstructions of ImageNet's 50 000 validation pictures against themselves",
    50_000, 256, 50_000, None, True, "rFID", ("FID", "sFID", "IS"),
  ),
  "rfid-coco": Protocol(
    "reconstructions of the 5 000 pictures of COCO val2017 against themselves",
    5_000, 256, 5_000, None, True, "rFID", ("FID", "sFID", "IS"),
  ),
  "custom": Protocol("any samples against any reference"),
}  # fmt: skip


def problems(protocol: Protocol, samples: Source, reference: Source) -> list[str]:
  """Why the pair does not give this protocol's score; empty if it does."""
  found = []
  if protocol.samples and samples.count != protocol.samples:
    found.append(
      f"{samples.count} samples, expected {protocol.samples}: FID falls with their"
      " number"
    )
  if samples.lossy:
    found.append("the samples are JPEG files, whose artefacts FID sees: use PNG or npz")
  for name, source in (("samples", samples), ("reference", reference)):
    if protocol.side and source.size not in (None, (protocol.side,) * 2):
      found.append(f"the {name} are {source.size}, expected {(protocol.side,) * 2}")
  wanted = protocol.reference_pictures
  if wanted and reference.count != wanted:
    text = f"the reference has {reference.count} pictures, expected {wanted}"
    if protocol.reference_statistics and reference.count == 50_000:
      text += ": it looks like the validation set, which is for rFID"
    elif protocol.same_order and reference.count == 10_000 and reference.statistics:
      text += ": it looks like the VIRTUAL npz, which is for gFID"
    found.append(text)
  if protocol.reference_statistics and "mu" not in reference.statistics:
    found.append(
      "the reference has no mu and sigma of the whole training set: it is not"
      " VIRTUAL_imagenet256_labeled.npz"
    )
  if "IS" in protocol.metrics and not protocol.same_order and _ordered(samples.labels):
    found.append(
      "the samples are in the order of their classes, but IS is a mean over"
      " consecutive splits: shuffle them"
    )
  if samples.sha256 == reference.sha256:
    found.append("samples and reference are the same file")
  return found


def _ordered(labels: np.ndarray | None) -> bool:
  return (
    labels is not None and len(set(labels)) > 1 and bool(np.all(np.diff(labels) >= 0))
  )


def published_model(settings: dict[str, Any] | None) -> str | None:
  """The published checkpoint of the shape that drew the samples, if one is."""
  config = (settings or {}).get("transformer_config", {})
  shape = tuple(config.get(name) for name in ("layers", "heads", "dim"))
  for name, known in PUBLISHED.items():
    same_size = known.image_size == (settings or {}).get("drawn_size")
    same_shape = PRESETS.get(known.model) == shape
    if same_size and same_shape and config.get("condition") == "class":
      return name
  return None
