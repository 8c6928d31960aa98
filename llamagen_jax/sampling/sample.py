"""Sampling many images: batches of conditions -> codes -> uint8 images.

Batch j is made of images [j b, (j + 1) b) and runs on one data shard of the mesh. With
D of them, D batches run side by side as one program, each of them through the same
arithmetic as alone: images do not depend on the number of devices.

Axes: N images of a job, B images of a batch, P condition tokens, C features, T codes.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Protocol

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from llamagen_jax.data.classes import shown_name, to_labels
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import resize_bicubic, to_uint8
from llamagen_jax.parallel.mesh import RULES, batch_sharding, on_mesh, shard_tree
from llamagen_jax.sampling.decode import DecodeInputs, generate_codes
from llamagen_jax.sampling.keys import as_keys, check_seed, image_keys
from llamagen_jax.sampling.known_codes import KnownCodes, complete_codes
from llamagen_jax.sampling.prompts import Prompts
from llamagen_jax.sampling.sizes import for_size
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.sides import Sides, as_sides, height_width
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import bundle


class Conditions(Protocol):
  """The conditions of images, in order; read a batch at a time."""

  def __len__(self) -> int:
    """Returns the number of images."""

  def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns conditions (labels [B] or features [B, P, C]) and their mask [B, P]."""

  def name(self, index: int) -> str:
    """Returns the text to write next to an image."""


@dataclasses.dataclass(frozen=True)
class Labels:
  """Class labels as conditions."""

  labels: np.ndarray  # int32 [N]
  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, indices: np.ndarray) -> tuple[np.ndarray, None]:
    return self.labels[indices], None

  def name(self, index: int) -> str:
    return shown_name(self.class_names, int(self.labels[index]))


@dataclasses.dataclass(frozen=True)
class SamplingJob:
  """A set of images to sample. Image i depends on its condition and (seed, i)."""

  conditions: Conditions
  sampling: SamplingConfig
  seed: int  # 0 .. 2^64 - 1
  batch_size: int  # images of a batch, sampled at once by a device or group of them
  image_size: Sides  # of the images that come out, in pixels
  given: KnownCodes | None = None  # of all images, where some codes are known

  def __post_init__(self):
    check_seed(self.seed)

  @property
  def batches(self) -> int:
    return math.ceil(len(self.conditions) / self.batch_size)

  def indices(self, batch: int) -> range:
    """Returns which images of the job a batch has."""
    start = batch * self.batch_size
    return range(start, min(start + self.batch_size, len(self.conditions)))


def sample(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  classes: Sequence[int | str] | str = (),
  *,
  prompts: Sequence[str] = (),
  text_encoder: TextEncoder | None = None,
  negative_prompt: str = "",
  image_size: Sides | None = None,
  seed: int = 0,
  batch_size: int = 32,
  **sampling,
) -> np.ndarray:
  """Samples one image a class or prompt.

  Args:
    gpt: from `load_gpt`; images are spread over its mesh, if it is on one.
    tokenizer: from `load_tokenizer`; the one whose codes `gpt` learned.
    classes: labels or names, or both as one text: "207, 360-362, tench".
    prompts: texts, instead of classes, for a transformer of captions.
    text_encoder: from `load_t5`; the one that `gpt` was trained with.
    negative_prompt: text that guidance leads away from.
    image_size: side or (height, width) in pixels, in the shape of one of the model's
      grids; default: of the first as it is.
    seed: 0 .. 2^64 - 1; image i depends on (seed, i) alone, not on what is sampled
      with it.
    batch_size: images at a time on every device.
    **sampling: fields of `SamplingConfig` that differ from the bundle's.

  Returns:
    uint8 [N, H, W, 3].

  Raises:
    UserError: for a class that is not known, a tokenizer of other codes, or a size of
      another shape.
  """
  size = None if image_size is None else as_sides(image_size, "image_size")
  gpt, drawn_size = for_size(gpt, tokenizer, size)
  conditions = conditions_of(gpt, classes, prompts, text_encoder, negative_prompt)
  job = SamplingJob(
    conditions,
    dataclasses.replace(gpt.sampling, **sampling),
    seed,
    min(batch_size, math.ceil(len(conditions) / num_data_shards(mesh_of(gpt)))),
    size or drawn_size,
  )
  return sample_images(gpt, tokenizer, job, Timings())


def conditions_of(
  gpt: bundle.Transformer,
  classes: Sequence[int | str] | str,
  prompts: Sequence[str],
  text_encoder: TextEncoder | None,
  negative_prompt: str,
) -> Conditions:
  """Returns the conditions that `sample` was asked for."""
  if gpt.config.condition == "caption":
    if text_encoder is None or not prompts:
      raise UserError("a transformer of captions takes prompts and a text_encoder")
    return Prompts.of(gpt, text_encoder, prompts, negative_prompt)
  labels = to_labels(classes, gpt.class_names, gpt.config.num_classes)
  return Labels(np.array(labels, np.int32), gpt.class_names)


def sample_images(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  timings: Timings,
) -> np.ndarray:
  """Samples a whole job; every host gets all images, uint8 [N, H, W, 3]."""
  return _collect(job, _image_groups(gpt, tokenizer, job, range(job.batches), timings))


def sample_image_codes(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  timings: Timings,
) -> np.ndarray:
  """Samples the codes of a whole job; every host gets all of them, int32 [N, T]."""
  return _collect(job, _code_groups(gpt, tokenizer, job, range(job.batches), timings))


def _collect(
  job: SamplingJob, groups: Iterator[tuple[Sequence[int], jax.Array]]
) -> np.ndarray:
  """Returns what all hosts sampled, without the images that filled batches up."""
  parts = []
  for group, images in groups:
    if jax.process_count() > 1:
      images = multihost_utils.process_allgather(images, tiled=True)
    count = sum(len(job.indices(batch)) for batch in group)
    parts.append(np.asarray(images)[:count])
  return np.concatenate(parts)


def sample_batches(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  batches: Sequence[int],
  timings: Timings,
) -> Iterator[tuple[int, np.ndarray]]:
  """Samples some batches of a job.

  All hosts call this with the same arguments; each gets the batches that its own
  devices sampled.

  Yields:
    The number of a batch and its images, uint8 [B, H, W, 3].
  """
  for group, images in _image_groups(gpt, tokenizer, job, batches, timings):
    for shard in images.addressable_shards:
      number = (shard.index[0].start or 0) // job.batch_size
      if shard.replica_id == 0 and number < len(group):
        count = len(job.indices(group[number]))
        yield group[number], np.asarray(shard.data)[:count]


def _image_groups(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  batches: Sequence[int],
  timings: Timings,
) -> Iterator[tuple[Sequence[int], jax.Array]]:
  """Yields batches that ran side by side, and their images [D B, H, W, 3]."""
  mesh, shape = mesh_of(gpt), (gpt.config.grid, job.image_size)
  for group, codes in _code_groups(gpt, tokenizer, job, batches, timings):
    with on_mesh(mesh), timings.clock("tokenizer"):
      images = render(tokenizer.config, *shape, mesh, tokenizer.params, codes)
      jax.block_until_ready(images)
    yield group, images


def _code_groups(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  batches: Sequence[int],
  timings: Timings,
) -> Iterator[tuple[Sequence[int], jax.Array]]:
  """Yields batches that ran side by side, and their codes [D B, T], of all hosts.

  A group that is not full repeats its last batch.
  """
  check_pair(gpt, tokenizer)
  mesh, shards = mesh_of(gpt), num_data_shards(mesh_of(gpt))
  gpt = restrict_to_codebook(gpt, tokenizer)
  params = decoding_params(gpt.config, gpt.params)
  for start in range(0, len(batches), shards):
    group = batches[start : start + shards]
    padded = [*group, *[group[-1]] * (shards - len(group))]
    indices = np.concatenate([_padded(job.indices(b), job.batch_size) for b in padded])
    condition, mask = job.conditions.take(indices)
    with on_mesh(mesh), timings.clock("decode"):
      keys = image_keys(job.seed, indices)
      if mesh is not None:
        by_batch = batch_sharding(mesh)
        keys, condition, mask = shard_tree((keys, condition, mask), by_batch)
      settings = job.sampling.for_batch(len(indices))
      inputs = DecodeInputs(params, as_keys(keys), mask, settings)
      asked = gpt.config, job.sampling, inputs, condition
      if job.given is None:
        codes, forwards = generate_codes(*asked)
      else:
        codes, forwards = complete_codes(*asked, job.given.take(indices))
      jax.block_until_ready(codes)
      timings.forwards += _local(forwards).tolist()
    yield group, codes


def check_pair(gpt: bundle.Transformer, tokenizer: bundle.Tokenizer) -> None:
  """Refuses a tokenizer whose codes the transformer did not learn."""
  if tokenizer.identity != gpt.tokenizer:
    raise UserError(
      f"the tokenizer {tokenizer.identity[:12]} is not the one that the"
      f" transformer learned the codes of, {gpt.tokenizer[:12]}"
    )


def restrict_to_codebook(
  gpt: bundle.Transformer, tokenizer: bundle.Tokenizer
) -> bundle.Transformer:
  """Returns a transformer that samples no codes beyond the codebook.

  A vocabulary may be larger than the codebook it was trained with; the logits of the
  codes beyond were never a target.
  """
  tokenizer.config.require_codes("the tokenizer")
  size, vocabulary = tokenizer.config.codebook_size, gpt.config.vocab_size
  if vocabulary <= size:
    return gpt
  logging.warning(
    "the transformer has %d codes, the codebook %d: codes beyond it are never sampled",
    vocabulary, size,
  )  # fmt: skip
  decoding = isinstance(gpt.params["layers"], tuple)  # [V, D], else [D, V]
  head = gpt.params["head"][:size] if decoding else gpt.params["head"][:, :size]
  table = gpt.params["code_embedding"][:size]
  return dataclasses.replace(
    gpt,
    config=dataclasses.replace(gpt.config, vocab_size=size),
    params=gpt.params | {"head": head, "code_embedding": table},
  )


def mesh_of(gpt: bundle.Transformer) -> Mesh | None:
  """Returns the mesh that a transformer was loaded on, if any."""
  sharding = getattr(gpt.params["norm"], "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def num_data_shards(mesh: Mesh | None) -> int:
  """Returns the number of batches that run side by side."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def _local(x_B: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the entries of an array that are on this host."""
  if isinstance(x_B, np.ndarray):
    return x_B
  shards = [shard for shard in x_B.addressable_shards if shard.replica_id == 0]
  return np.concatenate(
    [np.asarray(shard.data) for shard in shards] or [np.zeros(0, int)]
  )


def _padded(indices: range, size: int) -> np.ndarray:
  return np.minimum(np.arange(indices.start, indices.start + size), indices.stop - 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def render(
  config: TokenizerConfig,
  grid: Sides,
  image_size: Sides,
  mesh: Mesh | None,
  params,
  codes_BT,
):
  """Decodes codes [B, T] to uint8 images [B, *image_size, 3]."""

  def local_render(params, codes_BT):
    images = model.decode(config, params, codes_BT.reshape(-1, *height_width(grid)))
    if height_width(image_size) != images.shape[1:3]:
      images = resize_bicubic(images, image_size)
    return to_uint8(images)

  if mesh is None:
    return local_render(params, codes_BT)
  # Left to the compiler, devices that share a batch round otherwise than one device.
  rows = PartitionSpec(RULES["batch"])
  local = jax.shard_map(
    local_render,
    mesh=mesh,
    in_specs=(PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )
  return local(params, codes_BT)
