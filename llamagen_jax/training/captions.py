"""Captions in training: codes joined with features, or with a T5 that runs along.

Without `data.t5` the folders of texts hold features (`llamagen extract-text`). With it
they hold captions (`llamagen prepare-captions`), and the frozen encoder turns every
batch of tokens into features on the mesh, right before the step.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools

from jax.sharding import Mesh
import numpy as np

from llamagen_jax.data.captions import Caption, CaptionSource
from llamagen_jax.data.codes import CodeRecord, CodeSource
from llamagen_jax.data.features import BFLOAT16, FeatureRecord, FeatureSource
from llamagen_jax.data.loader import Batch, HostBatch, Stream
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.text.t5 import padded_features
from llamagen_jax.text.tokens import CaptionTokens
from llamagen_jax.weights.t5 import load_t5

Pair = tuple[CodeRecord, Caption | FeatureRecord]


class PairSource:
  """Codes and texts of the same samples; every pair is checked when it is read.

  Both were made from the same caption shards, in their order. Codes may lack the
  samples whose image was skipped.
  """

  def __init__(self, codes: CodeSource, texts: CaptionSource | FeatureSource):
    self.codes, self.texts = codes, texts
    if codes.manifest["samples"] != len(texts):
      raise UserError(
        f"{codes.folder} was made of {codes.manifest['samples']} samples,"
        f" {texts.folder} has {len(texts)}: they are not of the same captions"
      )

  def __len__(self) -> int:
    return len(self.codes)

  def __getitem__(self, index: int) -> Pair:
    record, text = self.codes[index], self.texts[self.codes.sample(index)]
    if record.key != text.key:
      raise UserError(
        f"sample {record.key} of {self.codes.folder} is not where {self.texts.folder}"
        " should have it: they are not of the same captions"
      )
    return record, text


@dataclasses.dataclass(frozen=True)
class PairInput:
  """Grain transform: pair -> fixed-shape arrays.

  `codes` [T]; `mask` [P], 1 on tokens; `features` [P, C] with the padding first, or
  `ids` [P] with the padding last; `valid` 0 where nothing is left of the caption.
  """

  tokens: int  # P
  vocabulary: CaptionTokens | None  # None: texts are features
  short_share: float  # probability of the short caption, where there is one

  def __call__(self, pair: Pair, rng: np.random.Generator) -> HostBatch:
    crop, short = rng.integers(len(pair[0].codes)), rng.random() < self.short_share
    return self._arrays(pair, crop, short)

  def first(self, pair: Pair) -> HostBatch:
    """For evaluation: the first crop and the long caption."""
    return self._arrays(pair, 0, short=False)

  def _arrays(self, pair: Pair, crop: int, short: bool) -> HostBatch:
    record, text = pair
    chosen = text.short if short and len(text.short) else text.caption
    if self.vocabulary is not None:
      ids, mask = self.vocabulary.row(chosen, self.tokens)
      arrays = {"ids": ids, "mask": mask}
    else:
      features = np.zeros((self.tokens, chosen.shape[1]), BFLOAT16)
      features[self.tokens - len(chosen) :] = chosen
      mask = np.arange(self.tokens) >= self.tokens - len(chosen)
      arrays = {"features": features, "mask": mask.astype(np.int32)}
    codes = record.codes[crop].astype(np.int32)
    return arrays | {"codes": codes, "valid": np.float32(mask.any())}


@dataclasses.dataclass(frozen=True)
class FeatureStream(Stream):
  """A stream of tokens whose batches come out as features."""

  captions: "Captions | None" = None

  def batches(self, mesh: Mesh, start: int) -> Iterator[Batch]:
    batches = super().batches(mesh, start)
    return (self.captions.features(batch, mesh) for batch in batches)


class Captions:
  """The caption side of a run: what to read, and the encoder that may run along."""

  def __init__(self, model: GPTConfig, t5: str, dtype: str, short_share: float):
    self._t5, self._dtype = t5, dtype
    vocabulary = CaptionTokens.load(t5) if t5 else None
    self.input = PairInput(model.caption_tokens, vocabulary, short_share)
    self._model = model
    self.encoder = functools.cache(self._load)

  def open(self, codes: Sequence[CodeSource], texts: str) -> list[PairSource]:
    """Joins folders of code shards with as many folders of texts, with commas."""
    if not texts:
      raise UserError(
        "model.condition is 'caption': --config.data.texts and --config.data.eval_texts"
        " are missing"
      )
    folders = texts.split(",")
    if len(folders) != len(codes):
      raise UserError(
        f"texts {texts}: expected a folder for each of {len(codes)} folders of codes"
      )
    pairs = zip(codes, folders, strict=True)
    return [self._open(source, folder.strip()) for source, folder in pairs]

  def _open(self, codes: CodeSource, texts: str) -> PairSource:
    if self._t5:
      return PairSource(codes, CaptionSource(texts))
    source = FeatureSource(texts)
    found = source.manifest
    self._check_width(found["dim"], f"features {texts}")
    if found["tokens"] > self._model.caption_tokens:
      raise UserError(
        f"features {texts}: captions of up to {found['tokens']} tokens, the model"
        f" expects {self._model.caption_tokens}:"
        f" --config.model.caption_tokens={found['tokens']}"
      )
    return PairSource(codes, source)

  def features(self, batch: Batch, mesh: Mesh) -> Batch:
    """Replaces the tokens of a batch, if it has any, by their features."""
    if "ids" not in batch:
      return batch
    ids, mask = batch["ids"], batch["mask"]
    encoder = self.encoder(mesh)
    features, mask = padded_features(encoder.config, encoder.params, ids, mask)
    rest = {name: value for name, value in batch.items() if name != "ids"}
    return rest | {"features": features, "mask": mask}

  def encoder_identity(self, source: PairSource, mesh: Mesh) -> str:
    """Content hash of the T5 whose features are learned from."""
    if not self._t5:
      return source.texts.manifest["t5"]
    return self.encoder(mesh).identity

  def _load(self, mesh: Mesh) -> TextEncoder:
    encoder = load_t5(self._t5, dtype=self._dtype, mesh=mesh)
    self._check_width(encoder.config.dim, f"data.t5={self._t5}")
    return encoder

  def _check_width(self, found: int, name: str) -> None:
    if found != self._model.caption_dim:
      raise UserError(
        f"{name}: features of width {found}, the model expects"
        f" {self._model.caption_dim}: --config.model.caption_dim={found}"
      )
