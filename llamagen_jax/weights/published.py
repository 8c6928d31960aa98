"""The published checkpoints with their scores and best settings.

Scores are those of arXiv 2406.06525 on 256x256 images: of the tokenizers on the
50 000 validation images of ImageNet, of the class-conditional transformers over
50 000 samples with the guidance given here, and without any (`unguided`). Those of its
successors are their papers': next-patch prediction (NPP, arXiv 2412.15321), condition
contrastive alignment (CCA, 2410.09347), guidance-free training (GFT, 2501.15420) and
AR-GRPO.
"""

from collections.abc import Mapping
import dataclasses
import os

from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.tokenizer.config import TokenizerConfig

C2I_REPO = "FoundationVision/LlamaGen"
T2I_REPO = "peizesun/llamagen_t2i"
NPP_REPO = "pytttttt/LlamaGen-NPP"
CCA_REPO, CCA_FOLDER = "ChenDRAG/CCA_LlamaGen", "CCA_LlamaGen_Guidance_Free"
GFT_REPO = "ChenDRAG/LLamaGen_GF"
GRPO_REPO = "CSshihao/ar-grpo"
ROW = "{:20} {:5} {:>7} {:>9} {:>8}  {}"


@dataclasses.dataclass(frozen=True)
class Published:
  """A checkpoint on the Hugging Face hub."""

  repo: str
  model: str  # name of a preset
  image_size: int  # of its training; a tokenizer takes others, too
  guidance_scale: float = 1.0  # with the best FID
  top_k: int = 0
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  unguided: Mapping[str, float] = dataclasses.field(default_factory=dict)
  file: str | None = None  # in the repository; None = the name and .pt, "" = not known
  guidance_beta: float = 1.0  # of a guidance-free model, with the best FID

  def file_of(self, name: str) -> str:
    """Returns the file's path in the repository, or nothing where it is not known."""
    return f"{name}.pt" if self.file is None else self.file

  @property
  def is_tokenizer(self) -> bool:
    return self.model.startswith("VQ")

  @property
  def sampling(self) -> SamplingConfig:
    return SamplingConfig(
      guidance_scale=self.guidance_scale, top_k=self.top_k,
      guidance_beta=self.guidance_beta,
    )  # fmt: skip


def _c2i(model: str, image_size: int, guidance: float, scores, unguided) -> Published:
  """Takes FID, IS, sFID, precision and recall, and FID and IS without guidance."""
  names = ("FID", "IS", "sFID", "precision", "recall")
  return Published(
    C2I_REPO, model, image_size, guidance,
    scores=dict(zip(names, scores, strict=True)),
    unguided=dict(zip(names[:2], unguided, strict=True)),
  )  # fmt: skip


def _npp(model: str, guidance: float, fid: float) -> Published:
  return Published(
    NPP_REPO, model, 256, guidance, scores={"FID": fid}, file=f"c2i_{model}_256.pt"
  )


def _cca(model: str, fid: float, **scores: float) -> Published:
  """A model that is sampled without guidance."""
  file = f"{CCA_FOLDER}/c2i_{model}_384_CCA_0005000.pt"
  return Published(CCA_REPO, model, 384, scores={"FID": fid, **scores}, file=file)


PUBLISHED = {
  "vq_ds16_c2i": Published(C2I_REPO, "VQ-16", 256, scores={"rFID": 2.19}),
  "vq_ds8_c2i": Published(C2I_REPO, "VQ-8", 256, scores={"rFID": 0.59}),
  "vq_ds16_t2i": Published(T2I_REPO, "VQ-16", 256),
  "c2i_B_256": _c2i("B", 256, 2.0, (5.46, 193.6, 7.50, 0.839, 0.457), (26.26, 48.1)),
  "c2i_B_384": _c2i("B", 384, 2.25, (6.09, 182.5, 7.24, 0.845, 0.416), (32.2, 39.9)),
  "c2i_L_256": _c2i("L", 256, 1.75, (3.80, 248.3, 8.49, 0.833, 0.515), (13.45, 82.3)),
  "c2i_L_384": _c2i("L", 384, 2.0, (3.07, 256.1, 6.09, 0.832, 0.522), (19.07, 64.3)),
  "c2i_XL_384": _c2i("XL", 384, 1.75, (2.62, 244.1, 5.59, 0.807, 0.579), (15.55, 79.2)),
  "c2i_XXL_384": _c2i(
    "XXL", 384, 1.75, (2.34, 253.9, 5.98, 0.809, 0.596), (14.65, 86.3)
  ),
  "c2i_3B_384": _c2i("3B", 384, 1.65, (2.18, 263.3, 5.97, 0.819, 0.581), (9.38, 112.9)),
  "t2i_XL_stage1_256": Published(T2I_REPO, "XL", 256, 7.5, 1000),
  "t2i_XL_stage2_512": Published(T2I_REPO, "XL", 512, 7.5, 1000),
  "npp_B_256": _npp("B", 2.0, 4.47),
  "npp_L_256": _npp("L", 1.75, 2.76),
  "npp_XL_256": _npp("XL", 1.70, 2.65),
  "npp_XXL_256": _npp("XXL", 1.65, 2.55),
  "c2i_B_384_CCA": _cca("B", 7.04),
  "c2i_L_384_CCA": _cca("L", 3.43),
  "c2i_XL_384_CCA": _cca("XL", 3.10),
  "c2i_XXL_384_CCA": _cca("XXL", 3.12),
  "c2i_3B_384_CCA": _cca("3B", 2.69, IS=276.8, precision=0.80, recall=0.59),
  "LlamaGenL_GF_scratch": Published(
    GFT_REPO, "L", 384, scores={"FID": 2.52}, guidance_beta=0.66
  ),
  "LlamaGen3B_GF": Published(
    GFT_REPO, "3B", 384, scores={"FID": 2.21}, guidance_beta=0.70
  ),
  "ar_grpo_XL_384": Published(GRPO_REPO, "XL", 384, 2.0, file=""),
}

# Tokenizers of width 128 by downsampling, blocks, quantizer, l2 norm, codes and their
# width, and their scores on ImageNet's validation images at 256x256 as their papers
# give them; those of the VAEs are LlamaGen's.
TOKENIZER_SCORES = {
  (16, "vqgan", "vq", True, 16384, 8): {
    "LlamaGen VQ-16": {"rFID": 2.19, "psnr": 20.79, "ssim_lg": 0.675},
  },
  (8, "vqgan", "vq", True, 16384, 8): {"LlamaGen VQ-8": {"rFID": 0.59}},
  (16, "vqgan", "vq", False, 1024, 256): {"VQGAN f16 1024": {"rFID": 7.94}},
  (16, "vqgan", "vq", False, 16384, 256): {
    "VQGAN f16 16384": {"rFID": 4.98, "psnr": 20.00, "ssim_lg": 0.629},
  },
  (8, "vqgan", "vq", False, 16384, 4): {
    "LDM vq-f8 16384": {"rFID": 1.14, "psnr": 23.38, "ssim_lg": 0.762},
  },
  (8, "vqgan", "vq", False, 256, 4): {"LDM vq-f8 256": {"rFID": 1.49}},
  (16, "vqgan", "ibq", False, 1024, 256): {"IBQ 1024": {"rFID": 2.24, "lpips": 0.258}},
  (16, "vqgan", "ibq", False, 8192, 256): {"IBQ 8192": {"rFID": 1.87, "lpips": 0.244}},
  (16, "vqgan", "ibq", False, 16384, 256): {
    "IBQ 16384": {"rFID": 1.37, "lpips": 0.2235},
  },
  (16, "vqgan", "ibq", False, 262144, 256): {
    "IBQ 262144": {"rFID": 1.00, "lpips": 0.203},
  },
  (16, "maskgit", "vq", False, 1024, 256): {"MaskGIT VQ": {"rFID": 2.28}},
  (8, "ldm", "none", False, 0, 4): {
    "SD VAE": {"rFID": 0.74, "psnr": 25.68, "ssim_lg": 0.820},
    "SDXL VAE": {"rFID": 0.68, "psnr": 26.04, "ssim_lg": 0.834},
  },
}  # fmt: skip


def published_tokenizers(config: TokenizerConfig) -> dict[str, dict[str, float]]:
  """Returns the scores of the published tokenizers of this shape, by their names."""
  shape = (
    config.downsample, config.blocks, config.quantizer, config.l2_norm,
    config.codebook_size, config.codebook_dim,
  )  # fmt: skip
  return TOKENIZER_SCORES.get(shape, {}) if config.width == 128 else {}


def identify(path: str | os.PathLike) -> str | None:
  """Returns the published name that a file's name starts with, if any."""
  stem = os.path.basename(os.fspath(path))
  return max((n for n in PUBLISHED if stem.startswith(n)), key=len, default=None)


def table() -> str:
  """Returns the published checkpoints as text, a line each."""
  rows = [ROW.format("name", "model", "image", "guidance", "top-k", "scores")]
  for name, known in PUBLISHED.items():
    scores = ", ".join(f"{k} {v:g}" for k, v in known.scores.items())
    sampling = ("", "") if known.is_tokenizer else (known.guidance_scale, known.top_k)
    rows.append(ROW.format(name, known.model, known.image_size, *sampling, scores))
  return "\n".join(row.rstrip() for row in rows)
