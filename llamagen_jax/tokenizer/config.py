"""Shape of the image tokenizer: one frozen dataclass and the published presets."""

import dataclasses
from typing import Any

from llamagen_jax.errors import UserError

# Channel multipliers per level, LlamaGen (arXiv 2406.06525), section 2.1.
PRESETS = {
  "VQ-16": (1, 1, 2, 2, 4),
  "VQ-8": (1, 2, 2, 4),
}

YOUNGER_FIELDS = ("blocks", "quantizer", "quant_conv", "pixel_range")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Everything that decides the functions a `VQModel` computes."""

  channel_multipliers: tuple[int, ...]  # one a level; downsample = 2**(levels - 1)
  width: int = 128  # channels of the first level
  res_blocks: int = 2  # residual blocks a level (the decoder has one more)
  latent_width: int = 256  # channels between encoder and quantizer
  codebook_size: int = 16384  # 0 = no codebook, with the quantizer "none" alone
  codebook_dim: int = 8  # channels of a latent, quantized or not
  # vqgan: attention at the lowest resolution, strided convolutions down (VQGAN,
  # LlamaGen, IBQ); ldm: as vqgan, but the middle alone has attention (Stable
  # Diffusion's VAE); maskgit: no attention, mean pooling, convolutions without bias.
  blocks: str = "vqgan"
  # vq: a latent takes the nearest row; ibq: the row of the largest dot product, and
  # gradients reach all rows (arXiv 2412.02692); none: a latent stays as it is, the
  # mean of a VAE's Gaussian (arXiv 2112.10752). Such a tokenizer only reconstructs.
  quantizer: str = "vq"
  quant_conv: bool = True  # 1x1 convolutions between latent_width and codebook_dim
  pixel_range: str = "signed"  # of the network: signed = [-1, 1] | unit = [0, 1]
  l2_norm: bool = True  # codes and latents live on the unit sphere
  norm_groups: int = 32  # of GroupNorm; divides every level's channels
  dropout: float = 0.0  # inside residual blocks
  commitment: float = 0.25  # weight of the commitment loss
  entropy_ratio: float = 0.0  # weight of the entropy loss; 0 = not computed
  dtype: str = "float32"  # of activations: float32 | bfloat16
  remat: bool = False  # training recomputes blocks in the backward pass

  def __post_init__(self):
    object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
    for name, known in (
      ("dtype", ("float32", "bfloat16")),
      ("blocks", ("vqgan", "ldm", "maskgit")),
      ("quantizer", ("vq", "ibq", "none")),
      ("pixel_range", ("signed", "unit")),
    ):
      if getattr(self, name) not in known:
        raise UserError(
          f"model.{name}={getattr(self, name)!r}: expected {' or '.join(known)}"
        )
    if min(self.channel_multipliers, default=0) < 1:
      raise UserError(
        f"model.channel_multipliers={self.channel_multipliers}: expected one or more"
        " whole numbers >= 1"
      )
    if self.continuous and self.codebook_size:
      raise UserError(
        f"model.codebook_size={self.codebook_size}: expected 0 with"
        " model.quantizer='none', which has no codes and cannot be trained"
      )
    if not self.continuous and not 1 < self.codebook_size < 2**31:
      raise UserError(
        f"model.codebook_size={self.codebook_size}: expected 2 .. {2**31 - 1}"
      )
    if not self.quant_conv and self.latent_width != self.codebook_dim:
      raise UserError(
        f"model.latent_width={self.latent_width}: without model.quant_conv expected"
        f" model.codebook_dim={self.codebook_dim}"
      )
    for channels in self.channels:
      if channels % self.norm_groups:
        raise UserError(
          f"model.norm_groups={self.norm_groups} does not divide a level's"
          f" {channels} channels"
        )

  @classmethod
  def preset(cls, name: str, **changes) -> "TokenizerConfig":
    """A published tokenizer: VQ-16 or VQ-8."""
    if name not in PRESETS:
      raise UserError(
        f"unknown tokenizer preset {name!r}: expected one of {', '.join(PRESETS)}"
      )
    return cls(PRESETS[name], **changes)

  @property
  def identity_fields(self) -> dict[str, Any]:
    """Fields that a tokenizer's identity depends on.

    A field that is younger than the first bundles counts where it is not the default,
    so that bundles and code shards keep their identities.
    """
    fields = dataclasses.asdict(self)
    for field in dataclasses.fields(self):
      if field.name in YOUNGER_FIELDS and fields[field.name] == field.default:
        del fields[field.name]
    return fields

  def require_codes(self, where: str) -> None:
    """Raises a UserError, which begins with `where`, for a continuous autoencoder."""
    if self.continuous:
      raise UserError(
        f"{where}: a continuous autoencoder has no codes; it is only there to"
        " reconstruct and to be compared"
      )

  @property
  def continuous(self) -> bool:
    """Returns whether it has latents and no codes, as a VAE has."""
    return self.quantizer == "none"

  @property
  def moments(self) -> int:
    """Returns the encoder's outputs for a latent: a mean, maybe a log-variance."""
    return 2 if self.continuous else 1

  @property
  def channels(self) -> tuple[int, ...]:
    return tuple(self.width * m for m in self.channel_multipliers)

  @property
  def downsample(self) -> int:
    return 2 ** (len(self.channel_multipliers) - 1)
