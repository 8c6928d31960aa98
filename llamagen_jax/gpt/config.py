"""Shape of the transformer: one frozen dataclass and the published presets."""

import dataclasses
import math

from llamagen_jax.errors import UserError
from llamagen_jax.sides import Sides, as_sides, grid_of, height_width

# name: (layers, heads, dim), LlamaGen (arXiv 2406.06525), tables 1 and 5.
PRESETS = {
  "B": (12, 12, 768),
  "L": (24, 16, 1024),
  "XL": (36, 20, 1280),
  "XXL": (48, 24, 1536),
  "XXXL": (48, 40, 2560),
  "1B": (22, 32, 2048),
  "3B": (24, 32, 3200),
  "7B": (32, 32, 4096),
}
KV_CACHES = ("float", "int8")  # of the codes' keys and values
KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # of attention, by backend


@dataclasses.dataclass(frozen=True)
class GPTConfig:
  """Everything that decides the function a `GPT` computes.

  The sequence is [condition tokens, code_0 .. code_{T-1}] with T = rows * columns
  codes in raster order. The last code is never an input, so the model sees
  `length` = prefix + T - 1 positions.
  """

  layers: int
  heads: int
  dim: int
  grid: Sides  # codes along a side of a square image, or (rows, columns)
  other_grids: tuple[Sides, ...] = ()  # that it is trained on, too
  kv_heads: int = 0  # 0 = one per query head
  vocab_size: int = 16384
  ffn_multiple: int = 256  # the hidden width is rounded up to this
  condition: str = "class"  # "class" | "caption"
  num_classes: int = 1000
  caption_tokens: int = 120
  caption_dim: int = 2048
  norm_eps: float = 1e-5
  rope_base: float = 10000.0
  # Released weights were trained with cos = sin = 0 on condition positions
  # ("zero"); "identity" leaves queries and keys there as they are.
  prefix_rope: str = "zero"
  # Guidance-free models (GFT) see the guidance strength as a part of the class token.
  guidance_embedding: bool = False
  # Models trained in random orders see the position of the code to predict.
  target_embedding: bool = False
  qk_norm: bool = False  # RMSNorm of queries and keys; released weights have none
  embedding_dropout: float = 0.1
  residual_dropout: float = 0.1  # output of attention and of the FFN
  attention_dropout: float = 0.0
  drop_path: float = 0.0  # stochastic depth, of the last layer; linear in depth
  condition_dropout: float = 0.1  # share of samples trained without condition
  dtype: str = "float32"  # of activations and matmul inputs: float32 | bfloat16
  # Of codes' keys and values in decoding: float, which is `dtype` | int8
  kv_cache: str = "float"
  remat: str = "none"  # none | dots | full
  # Of training: xla | splash, the TPU's kernel | cudnn, the GPU's | auto, see
  # `for_backend`.
  attention: str = "xla"

  def __post_init__(self):
    object.__setattr__(self, "grid", as_sides(self.grid, "model.grid"))
    others = tuple(as_sides(grid, "model.other_grids") for grid in self.other_grids)
    object.__setattr__(self, "other_grids", others)
    if len(set(self.grids)) < len(self.grids):
      raise UserError(f"model.other_grids={others}: a grid is there twice")
    if others and self.target_embedding:
      raise UserError(
        "model.other_grids: a model with model.target_embedding has one grid"
      )
    _one_of("condition", self.condition, ("class", "caption"))
    _one_of("prefix_rope", self.prefix_rope, ("zero", "identity"))
    _one_of("dtype", self.dtype, ("float32", "bfloat16"))
    _one_of("kv_cache", self.kv_cache, KV_CACHES)
    _one_of("remat", self.remat, ("none", "dots", "full"))
    _one_of("attention", self.attention, ("auto", "xla", *KERNELS.values()))
    if self.attention in KERNELS.values() and self.attention_dropout:
      raise UserError(
        f"model.attention={self.attention!r} has no model.attention_dropout"
      )
    if self.attention == "cudnn" and self.dtype == "float32":
      raise UserError("model.attention='cudnn' needs model.dtype='bfloat16'")
    if self.guidance_embedding and self.condition != "class":
      raise UserError("model.guidance_embedding: expected model.condition='class'")
    if self.dim % self.heads or self.head_dim % 4:
      raise UserError(
        f"model.dim={self.dim} with model.heads={self.heads}: 2-D RoPE needs"
        " dim / heads to be a multiple of 4"
      )
    if self.heads % self.num_kv_heads:
      raise UserError(
        f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}"
      )

  @classmethod
  def preset(
    cls, name: str, *, image_size: Sides, downsample: int = 16, **changes
  ) -> "GPTConfig":
    """A published size for images of a side in pixels, or of (height, width)."""
    if name not in PRESETS:
      raise UserError(
        f"unknown GPT preset {name!r}: expected one of {', '.join(PRESETS)}"
      )
    layers, heads, dim = PRESETS[name]
    return cls(layers, heads, dim, grid=grid_of(image_size, downsample), **changes)

  def for_backend(self, backend: str) -> "GPTConfig":
    """Returns the config with an attention that a backend runs.

    "auto" is the kernel of a TPU or GPU where that has what the model needs, and xla
    elsewhere.

    Args:
      backend: "cpu", "tpu" or "gpu", as JAX names them.

    Raises:
      UserError: the config names the kernel of another backend.
    """
    kernel = KERNELS.get(backend, "xla")
    if self.attention == "auto":
      unfit = self.attention_dropout or (kernel == "cudnn" and self.dtype == "float32")
      return dataclasses.replace(self, attention="xla" if unfit else kernel)
    if self.attention not in ("xla", kernel):
      raise UserError(
        f"model.attention={self.attention!r} does not run on {backend}: expected"
        f" {' or '.join(dict.fromkeys(('auto', 'xla', kernel)))}"
      )
    return self

  def at(self, grid: Sides) -> "GPTConfig":
    """Returns the config of the same weights for one of `grids` alone."""
    return dataclasses.replace(self, grid=grid, other_grids=())

  @property
  def grids(self) -> tuple[Sides, ...]:
    """All grids that it is trained on."""
    return self.grid, *self.other_grids

  @property
  def head_dim(self) -> int:
    return self.dim // self.heads

  @property
  def num_kv_heads(self) -> int:
    return self.kv_heads or self.heads

  @property
  def ffn_dim(self) -> int:
    """SwiGLU width: 2/3 of 4 * dim, rounded up (Llama, arXiv 2302.13971)."""
    hidden = int(2 * 4 * self.dim / 3)
    return -(-hidden // self.ffn_multiple) * self.ffn_multiple

  @property
  def grid_hw(self) -> tuple[int, int]:
    """Rows and columns of codes."""
    return height_width(self.grid)

  @property
  def image_tokens(self) -> int:
    return math.prod(self.grid_hw)

  @property
  def prefix_tokens(self) -> int:
    return 1 if self.condition == "class" else self.caption_tokens

  @property
  def length(self) -> int:
    """Positions the model sees, and the length of its KV cache."""
    return self.prefix_tokens + self.image_tokens - 1


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise UserError(f"model.{field}={value!r}: expected one of {', '.join(allowed)}")
