"""Named protocols: the reference that belongs to a score, and its conditions."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.image_sets import ImageSet
from llamagen_jax.gpt.config import PRESETS
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights.published import PUBLISHED


@dataclasses.dataclass(frozen=True)
class Protocol:
  """The conditions under which a score has a protocol's name."""

  about: str
  samples: int | None = None  # images that are scored
  side: int | None = None  # of samples and references
  reference_images: int | None = None  # in the reference
  reference_statistics: bool | None = None  # it brings its own mean and covariance
  same_order: bool = False  # sample i is a reconstruction of reference i
  fid_name: str = "FID"  # among the published scores
  crop_reference: bool = False  # its images are centre-cropped to `side`
  prefix: str = ""  # of every prompt, for the CLIP score
  metrics: tuple[str, ...] = ("FID", "sFID", "IS", "precision", "recall")


PROTOCOLS = {
  "gfid-adm-imagenet256": Protocol(
    "50 000 samples against VIRTUAL_imagenet256_labeled.npz, as ADM and LlamaGen",
    50_000, 256, 10_000, True,
  ),
  "rfid-imagenet256": Protocol(
    "reconstructions of ImageNet's 50 000 validation images against themselves",
    50_000, 256, 50_000, None, True, "rFID", ("FID", "sFID", "IS"),
  ),
  "rfid-coco": Protocol(
    "reconstructions of the 5 000 images of COCO val2017 against themselves",
    5_000, 256, 5_000, None, True, "rFID", ("FID", "sFID", "IS"),
  ),
  "t2i-coco30k": Protocol(
    "30 000 images of captions of COCO against all of val2014, cropped to 256x256,"
    " and CLIP score with CLIPScore's prefix",
    30_000, 256, 40_504, crop_reference=True, prefix="A photo depicts ",
    metrics=("FID", "CLIP score"),
  ),
  "custom": Protocol("any samples against any reference; CLIP score with --clip"),
}  # fmt: skip


# Protocols that the scores of published transformers were measured by.
GFID = ("gfid-adm-imagenet256",)
# Scores of admnet_guided_upsampled_imagenet256.npz by OpenAI's evaluator and the same
# protocol: they check the whole evaluation.
KNOWN_RESULTS = {
  "ADM-G+U": {
    "FID": 3.9426, "IS": 215.837, "sFID": 6.1404, "precision": 0.8265, "recall": 0.5309,
  }
}  # fmt: skip
SHAPE = ("channel_multipliers", "width", "codebook_size", "codebook_dim")
# rFID by tokenizer and side of its images; those above 256 are scored at 256.
RFID = {
  "rfid-imagenet256": {
    ("vq_ds16_c2i", 256): 2.19, ("vq_ds16_c2i", 384): 0.94, ("vq_ds16_c2i", 512): 0.70,
    ("vq_ds8_c2i", 256): 0.59, ("vq_ds8_c2i", 384): 0.37, ("vq_ds8_c2i", 512): 0.39,
  },
  "rfid-coco": {("vq_ds16_c2i", 256): 8.11, ("vq_ds8_c2i", 256): 4.19},
}  # fmt: skip


def problems(protocol: Protocol, samples: ImageSet, reference: ImageSet) -> list[str]:
  """Returns why the pair does not give this protocol's score; empty if it does."""
  found = sample_problems(protocol, samples) + reference_problems(protocol, reference)
  if samples.sha256 == reference.sha256:
    found.append("samples and reference are the same file")
  return found


def sample_problems(protocol: Protocol, samples: ImageSet) -> list[str]:
  found = count_problems(protocol, samples.count) + _size_problems(
    protocol, "samples", samples
  )
  if samples.lossy:
    found.append("the samples are JPEG files, whose artefacts FID sees: use PNG or npz")
  if "IS" in protocol.metrics and not protocol.same_order and _ordered(samples.labels):
    found.append(
      "the samples are in the order of their classes, but IS is a mean over"
      " consecutive splits: shuffle them"
    )
  return found


def count_problems(protocol: Protocol, count: int) -> list[str]:
  if protocol.samples in (None, count):
    return []
  return [f"{count} samples, expected {protocol.samples}: FID falls with their number"]


def reference_problems(protocol: Protocol, reference: ImageSet) -> list[str]:
  found = _size_problems(protocol, "reference", reference)
  wanted = protocol.reference_images
  if wanted and reference.count != wanted:
    text = f"the reference has {reference.count} images, expected {wanted}"
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
  return found


def _size_problems(protocol: Protocol, name: str, source: ImageSet) -> list[str]:
  wanted = (protocol.side, protocol.side)
  if protocol.side is None or source.size in (None, wanted):
    return []
  return [f"images of the {name} are {source.size}, expected {wanted}"]


def _ordered(labels: np.ndarray | None) -> bool:
  return (
    labels is not None and len(set(labels)) > 1 and bool(np.all(np.diff(labels) >= 0))
  )


def published_model(name: str, settings: dict[str, Any] | None) -> str | None:
  """Returns the published checkpoint of the samples' model's shape, if there is one."""
  settings = settings or {}
  tokenizer = settings.get("tokenizer_config")
  transformer = settings.get("transformer_config")
  if name in GFID and transformer:
    size = settings.get("sampled_size")
    shape = tuple(transformer.get(field) for field in ("layers", "heads", "dim"))
    fitting = (
      known
      for known, model in PUBLISHED.items()
      if model.image_size == size
      and PRESETS.get(model.model) == shape
      and transformer.get("condition") == "class"
    )
    return next(fitting, None)
  if name in RFID and tokenizer:
    size = settings.get("image_size")
    for known in ("vq_ds16_c2i", "vq_ds8_c2i"):
      preset = dataclasses.asdict(TokenizerConfig.preset(PUBLISHED[known].model))
      same = all(_listed(tokenizer.get(x)) == _listed(preset[x]) for x in SHAPE)
      if same and (known, size) in RFID[name]:
        return f"{known}@{size}"
  return None


def differences(settings: dict[str, Any] | None, model: str | None) -> list[str]:
  """Returns the sampling settings that differ from the published score's."""
  ours, known = (settings or {}).get("sampling"), PUBLISHED.get(model or "")
  if not ours or known is None or known.is_tokenizer:
    return []
  different = different_settings(ours, dataclasses.asdict(known.sampling))
  return [
    f"{name} is {value}, the published score's {other}"
    for name, (value, other) in different.items()
  ]


def different_settings(
  ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns (our value, theirs) of the sampling settings that make other images.

  A window changes the speed alone, a power nothing but its own schedule.
  """
  alike = {"window"}
  if "power-cosine" not in (s.get("guidance_schedule") for s in (ours, theirs)):
    alike.add("guidance_power")
  return {
    name: (ours[name], value)
    for name, value in theirs.items()
    if name not in alike and ours.get(name, value) != value
  }


def _listed(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def published_scores(name: str, model: str | None) -> dict[str, float]:
  """Returns a model's published scores by a protocol; none for no model.

  Args:
    model: of `PUBLISHED`; a tokenizer may have the side of its images, @384.

  Raises:
    UserError: for a model that has no score by this protocol.
  """
  if model is None:
    return {}
  checkpoint, _, size = model.partition("@")
  known = {}
  if name in RFID:
    known = {"rFID": RFID[name].get((checkpoint, int(size or 256)))}
  elif name in GFID and model in KNOWN_RESULTS:
    known = KNOWN_RESULTS[model]
  elif checkpoint in PUBLISHED and not size:
    known = PUBLISHED[checkpoint].scores
  if not known or None in known.values() or "rFID" in known and name not in RFID:
    with_scores = [m for m, known in PUBLISHED.items() if "FID" in known.scores]
    with_scores += KNOWN_RESULTS
    if name in RFID:
      with_scores = [f"{m}@{side}" for m, side in RFID[name]]
    raise UserError(
      f"--model={model} has no published score by {name}; these have:"
      f" {', '.join(with_scores)}"
    )
  return dict(known)
