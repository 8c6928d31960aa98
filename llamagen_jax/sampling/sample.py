"""Drawing many images: batches of conditions -> codes -> uint8 images.

Batch j is made of images [j b, (j + 1) b) and runs on one data-parallel slot of the
mesh. With D slots, D batches run side by side as one program, each of them through
the same arithmetic as alone: images do not depend on the number of devices.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
import time
from typing import Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from llamagen_jax.data.classes import shown_name, to_labels
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.images import resize_bicubic, to_uint8
from llamagen_jax.parallel.mesh import RULES, batch_sharding, shard_tree
from llamagen_jax.sampling.decode import generate
from llamagen_jax.sampling.prompts import Prompts
from llamagen_jax.text.encoder import TextEncoder
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.weights import bundle


class Conditions(Protocol):
  """What the images are drawn of, in order; read a batch at a time."""

  def __len__(self) -> int:
    """Images to draw."""

  def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Condition (labels [B] or features [B, P, C]) and mask [B, P] of some rows."""

  def name(self, row: int) -> str:
    """What to write next to an image."""


@dataclasses.dataclass(frozen=True)
class Labels:
  """Class labels as conditions."""

  labels: np.ndarray  # int32 [N]
  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
    return self.labels[rows], None

  def name(self, row: int) -> str:
    return shown_name(self.class_names, int(self.labels[row]))


@dataclasses.dataclass
class Timings:
  """Where the time went; filled while images are drawn."""

  compile: float = 0.0  # tracing and compiling, of both models
  decode: float = 0.0  # codes, by the transformer
  tokenizer: float = 0.0  # codes to images

  def __str__(self) -> str:
    total = self.compile + self.decode + self.tokenizer
    return (
      f"{total:.1f} s: compile {self.compile:.1f}, decode {self.decode:.1f},"
      f" tokenizer {self.tokenizer:.1f}"
    )

  @contextlib.contextmanager
  def clock(self, field: str) -> Iterator[None]:
    """Adds the time of its body to a field, less what went into compiling."""
    started, compiled = time.perf_counter(), 0.0

    def listen(event: str, seconds: float, **_):
      nonlocal compiled
      if event.startswith("/jax/core/compile/"):
        compiled += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      yield
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
      elapsed = time.perf_counter() - started
      self.compile += compiled
      setattr(self, field, getattr(self, field) + elapsed - compiled)


@dataclasses.dataclass(frozen=True)
class SamplingJob:
  """A set of images to draw. Image i depends on its condition and (seed, i)."""

  conditions: Conditions
  sampling: SamplingConfig
  seed: int
  batch_size: int  # images a batch: what one device, or group of them, draws at once
  image_size: int  # side of the images that come out

  @property
  def batches(self) -> int:
    return math.ceil(len(self.conditions) / self.batch_size)

  def rows(self, batch: int) -> range:
    """The images of a batch."""
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
  seed: int = 0,
  batch_size: int = 32,
  **sampling,
) -> np.ndarray:
  """Draws one image a class or prompt.

  Args:
    gpt: from `load_gpt`; images are spread over its mesh, if it is on one.
    tokenizer: from `load_tokenizer`; the one whose codes `gpt` learned.
    classes: labels or names, or both as one text: "207, 360-362, tench".
    prompts: texts, instead of classes, for a transformer of captions.
    text_encoder: from `load_t5`; the one that `gpt` was trained with.
    negative_prompt: what guidance leads away from.
    seed: image i depends on (seed, i) alone, not on what is drawn with it.
    batch_size: images at a time on every device.
    **sampling: fields of `SamplingConfig` that differ from the bundle's.

  Returns:
    uint8 [B, H, W, 3].

  Raises:
    UserError: for a class that is not known or a tokenizer of other codes.
  """
  conditions: Conditions
  if gpt.config.condition == "caption":
    if text_encoder is None or not prompts:
      raise UserError("a transformer of captions draws prompts, with a text_encoder")
    conditions = Prompts.of(gpt, text_encoder, prompts, negative_prompt)
  else:
    labels = to_labels(classes, gpt.class_names, gpt.config.num_classes)
    conditions = Labels(np.array(labels, np.int32), gpt.class_names)
  job = SamplingJob(
    conditions,
    dataclasses.replace(gpt.sampling, **sampling),
    seed,
    min(batch_size, math.ceil(len(conditions) / num_data_shards(mesh_of(gpt)))),
    gpt.config.grid * tokenizer.config.downsample,
  )
  drawn = dict(draw(gpt, tokenizer, job, range(job.batches), Timings()))
  return np.concatenate([drawn[batch] for batch in range(job.batches)])


def draw(
  gpt: bundle.Transformer,
  tokenizer: bundle.Tokenizer,
  job: SamplingJob,
  batches: Sequence[int],
  seconds: Timings,
) -> Iterator[tuple[int, np.ndarray]]:
  """Draws some batches of a job.

  All hosts call this with the same arguments; each gets the batches that its own
  devices drew.

  Yields:
    The number of a batch and its images, uint8 [B, H, W, 3].
  """
  check_pair(gpt, tokenizer)
  mesh, b = mesh_of(gpt), job.batch_size
  params = decoding_params(gpt.config, gpt.params)
  for start in range(0, len(batches), num_data_shards(mesh)):
    group = batches[start : start + num_data_shards(mesh)]
    # A group that is not full draws its last batch again in the empty slots.
    padded = [*group, *[group[-1]] * (num_data_shards(mesh) - len(group))]
    rows = np.concatenate([_padded(job.rows(batch), b) for batch in padded])
    condition, mask = job.conditions.take(rows)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      with seconds.clock("decode"):
        if mesh is not None:
          by_batch = batch_sharding(mesh)
          rows, condition, mask = shard_tree((rows, condition, mask), by_batch)
        keys = _keys(job.seed, rows)
        codes = generate(gpt.config, params, condition, keys, mask, job.sampling)
        jax.block_until_ready(codes)
      with seconds.clock("tokenizer"):
        shape = (gpt.config.grid, job.image_size)
        images = render(tokenizer.config, *shape, mesh, tokenizer.params, codes)
        jax.block_until_ready(images)
    for shard in images.addressable_shards:
      slot = (shard.index[0].start or 0) // b
      if shard.replica_id == 0 and slot < len(group):
        count = len(job.rows(group[slot]))
        yield group[slot], np.asarray(shard.data)[:count]


def check_pair(gpt: bundle.Transformer, tokenizer: bundle.Tokenizer) -> None:
  """Refuses a tokenizer whose codes the transformer did not learn."""
  if tokenizer.identity != gpt.tokenizer:
    raise UserError(
      f"the tokenizer {tokenizer.identity[:12]} is not the one that the"
      f" transformer learned the codes of, {gpt.tokenizer[:12]}"
    )


def mesh_of(gpt: bundle.Transformer) -> Mesh | None:
  """The mesh that a transformer was loaded on, if any."""
  sharding = getattr(gpt.params["head"], "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def num_data_shards(mesh: Mesh | None) -> int:
  """Batches that run side by side."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def _padded(rows: range, size: int) -> np.ndarray:
  return np.minimum(np.arange(rows.start, rows.start + size), rows.stop - 1)


@functools.partial(jax.jit, static_argnums=0)
def _keys(seed: int, rows_B: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def render(
  config: TokenizerConfig, grid: int, side: int, mesh: Mesh | None, params, codes_BT
):
  """Codes [B, T] -> uint8 images [B, side, side, 3]."""

  def local_render(params, codes_BT):
    images = model.decode(config, params, codes_BT.reshape(-1, grid, grid))
    if side != images.shape[1]:
      images = resize_bicubic(images, side)
    return to_uint8(images)

  if mesh is None:
    return local_render(params, codes_BT)
  # Left to the compiler, devices that share a batch would round otherwise than one.
  rows = PartitionSpec(RULES["batch"])
  local = jax.shard_map(
    local_render,
    mesh=mesh,
    in_specs=(PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )
  return local(params, codes_BT)
