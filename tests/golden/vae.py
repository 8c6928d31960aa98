"""Writes golden_vae.npz and manifest_vae.json: outputs of diffusers' `AutoencoderKL`.

Made with diffusers 0.42.1 and torch 2.13.0:

    pip install diffusers && python -m tests.golden.vae

Two networks of two levels: that of Stable Diffusion, and one without the convolutions
around its latents, as Stable Diffusion 3 has it. Weights follow the rule of
`tests/parity.py`, by diffusers' names. The manifest has the shape of every tensor and
its name in LDM's files, as diffusers reads them.
"""

import json

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
import numpy as np
import torch

from llamagen_jax.weights import tokenizer_from_torch, tokenizer_to_torch
from tests import parity

SMALL = {
  "block_out_channels": (32, 64),
  "down_block_types": ("DownEncoderBlock2D",) * 2,
  "up_block_types": ("UpDecoderBlock2D",) * 2,
  "layers_per_block": 2,
}
NETWORKS = {
  "vae": SMALL,
  "vae_bare": SMALL
  | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}
SIDE = 32


def main() -> None:
  numbers, names = {}, {}
  for name, fields in NETWORKS.items():
    vae = AutoencoderKL(**fields).eval()
    shapes = {key: list(value.shape) for key, value in vae.state_dict().items()}
    weights = parity.synthesize(shapes)
    vae.load_state_dict({key: torch.from_numpy(w) for key, w in weights.items()})
    images = np.tanh(parity.randn(f"{name}/image", (1, 3, SIDE, SIDE)))
    with torch.no_grad():
      latents = vae.encode(torch.from_numpy(images)).latent_dist.mode()
      decoded = vae.decode(latents).sample
    numbers[f"{name}_latent"] = latents.numpy().transpose(0, 2, 3, 1)
    numbers[f"{name}_recon"] = decoded.numpy().transpose(0, 2, 3, 1)
    ldm = _ldm_names(vae, weights)
    names[name] = {key: [ldm[key], shape] for key, shape in shapes.items()}
  np.savez_compressed(parity.FOLDER / "golden_vae.npz", **numbers)
  text = json.dumps(names, separators=(",", ":"))
  (parity.FOLDER / "manifest_vae.json").write_text(text + "\n")


def _ldm_names(vae: AutoencoderKL, weights: dict[str, np.ndarray]) -> dict[str, str]:
  """Returns diffusers' names -> LDM's: those of ours that its reader takes for them."""
  ours = list(tokenizer_to_torch(*tokenizer_from_torch(weights, "diffusers")))
  marked = {name: np.full((1,) * 4, i) for i, name in enumerate(ours)}
  found = convert_ldm_vae_checkpoint(marked, dict(vae.config))
  return {name: ours[int(found[name].flat[0])] for name in weights}


if __name__ == "__main__":
  main()
