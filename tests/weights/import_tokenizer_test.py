"""`import-weights` and `export-weights` of tokenizers, ours and those of others."""

import numpy as np
import pytest

import llamagen_jax as lg
from llamagen_jax.weights.files import read_weights, write_weights
from tests import parity
from tests.weights.import_test import assert_same, llamagen

OLDER_NAMES = {  # of diffusers' attention
  "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn",
}  # fmt: skip


@pytest.mark.extra
@pytest.mark.slow
@pytest.mark.parametrize("model, side", [("VQ-16", 64), ("VQ-8", 32)])
def test_tokenizers_through_files(tmp_path, capsys, model, side):
  torch = pytest.importorskip("torch")
  golden, weights = parity.golden(), parity.state_dict(model)
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  used = {"quantize.codebook_used": torch.zeros(65536)}
  torch.save({"model": tensors | used}, tmp_path / "vq.pt")
  out = tmp_path / "vq"
  code, text = llamagen(capsys, f"import-weights --file={tmp_path}/vq.pt --out={out}")
  assert code == 0, text
  tokenizer = lg.load_tokenizer(out)
  images = np.tanh(parity.randn(f"{model}/image", (2, 3, side, side)))
  codes = tokenizer.encode(images.transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(codes, golden[f"{model}_indices"])
  recon = tokenizer.decode(codes)
  np.testing.assert_allclose(recon, golden[f"{model}_recon"], atol=2e-4)

  code, text = llamagen(capsys, f"export-weights --bundle={out} --out={tmp_path}/b.pt")
  assert code == 0, text
  found, key, _ = read_weights(tmp_path / "b.pt")
  assert key == "model"
  buffer = found.pop("quantize.codebook_used")  # which the original asks for
  assert buffer.shape == (65536,)
  assert_same(found, weights)
  code, _ = llamagen(capsys, f"import-weights --file={tmp_path}/b.pt --out={out}2")
  assert lg.load_tokenizer(f"{out}2").identity == tokenizer.identity


@pytest.mark.extra
@pytest.mark.parametrize(
  "name, kind", [("taming_f8", "taming"), ("maskgit_f16", "maskgit")]
)
def test_tokenizers_of_others_from_lightning(tmp_path, capsys, name, kind):
  """With the loss networks beside them, and averages under names without dots."""
  torch = pytest.importorskip("torch")
  weights = parity.synthesize(parity.beyond_manifest()[name])
  tensors = {n: torch.from_numpy(value) for n, value in weights.items()}
  averaged = {
    f"model_ema.{n.replace('.', '')}": tensor * 2 for n, tensor in tensors.items()
  }
  beside = {"loss.discriminator.main.0.weight": torch.zeros(3)}
  numbers = {"model_ema.decay": torch.tensor(0.999)}
  content = {"epoch": 9, "state_dict": tensors | averaged | beside | numbers}
  torch.save(content, tmp_path / "last.ckpt")
  out = tmp_path / "vq"
  command = f"import-weights --file={tmp_path}/last.ckpt --out={out}"
  code, text = llamagen(capsys, command)
  assert code == 0, text
  assert f"tokenizer in {kind} layout" in text
  assert "48 codes" in text and "entry 'state_dict'" in text
  tokenizer = lg.load_tokenizer(out)
  assert not tokenizer.config.l2_norm
  np.testing.assert_array_equal(
    tokenizer.params["codebook"], 2 * weights["quantize.embedding.weight"]
  )
  del tensors["encoder.norm_out.bias"]
  torch.save({"state_dict": tensors | beside}, tmp_path / "last.ckpt")
  code, text = llamagen(capsys, f"{command}2")
  assert code == 2 and "missing encoder.norm_out.bias (128,)" in text
  assert "1 problems" in text and not (tmp_path / "vq2").exists()


@pytest.mark.extra
def test_the_vae_inside_a_latent_diffusion_model(tmp_path, capsys):
  torch = pytest.importorskip("torch")
  weights = parity.vae_state_dicts("vae")["kl"]
  tensors = {f"first_stage_model.{n}": torch.from_numpy(w) for n, w in weights.items()}
  unet = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(9)}
  file, out = tmp_path / "model.ckpt", tmp_path / "vae"
  torch.save({"epoch": 9, "state_dict": unet | tensors}, file)
  command = f"import-weights --file={file} --out={out}"
  code, text = llamagen(capsys, command)
  assert code == 0, text
  assert "kl layout, downsampling 2, no codes but latents of 4 channels" in text
  code, text = llamagen(capsys, f"export-weights --bundle={out} --out={tmp_path}/b.pt")
  assert code == 0, text
  assert_same(read_weights(tmp_path / "b.pt").tensors, weights)
  del tensors["first_stage_model.encoder.mid.attn_1.k.bias"]
  surprise = {"first_stage_model.encoder.down.1.attn.3.q.bias": torch.zeros(64)}
  torch.save({"state_dict": unet | tensors | surprise}, file)
  code, text = llamagen(capsys, f"{command}2")
  assert code == 2 and "missing encoder.mid.attn_1.k.bias (64,)" in text
  assert "unexpected encoder.down.1.attn.3.q.bias (64,)" in text


@pytest.mark.extra
@pytest.mark.parametrize("renamed", [{}, OLDER_NAMES])
def test_vaes_from_diffusers(tmp_path, capsys, renamed):
  layouts = parity.vae_state_dicts("vae")
  weights = layouts["diffusers"]
  for new, old in renamed.items():
    weights = {name.replace(new, old): value for name, value in weights.items()}
  file, out = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "vae"
  write_weights(file, weights)
  code, text = llamagen(capsys, f"import-weights --file={file} --out={out}")
  assert code == 0 and "diffusers layout" in text, text
  vae = lg.load_tokenizer(out)
  found = lg.weights.tokenizer_to_torch(vae.config, vae.params)
  assert_same(found, layouts["kl"])


@pytest.mark.extra
@pytest.mark.parametrize(
  "kind, words",
  [
    ("llamagen", ["no encoder.conv_blocks.0.res.0.conv1.weight", "read as llamagen"]),
    ("diffusers", ["no encoder.down_blocks.0.resnets.0.conv1.weight"]),
    ("maskgit", ["missing encoder.mid.0", "give --kind"]),
  ],
)
def test_a_layout_that_it_is_not_is_one_line(tmp_path, capsys, kind, words):
  weights = parity.synthesize(parity.beyond_manifest()["taming_f8"])
  file, out = tmp_path / "vq.safetensors", tmp_path / "vq"
  write_weights(file, weights)
  command = f"import-weights --file={file} --out={out} --kind={kind}"
  code, text = llamagen(capsys, command)
  assert code == 2 and len(text.strip().splitlines()) == 1
  assert all(word in text for word in words), text
  assert not out.exists()


@pytest.mark.extra
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_torch_are_read_as_they_are(dtype):
  """As `module.state_dict()` has them, parameters with gradients among them."""
  torch = pytest.importorskip("torch")
  weights = parity.synthesize(parity.beyond_manifest()["taming_f8"])
  tensors = {
    name: torch.nn.Parameter(torch.from_numpy(value).to(getattr(torch, dtype)))
    for name, value in weights.items()
  }
  config, params = lg.weights.tokenizer_from_torch(tensors)
  assert not config.l2_norm  # the names say that it is VQGAN's
  expected = tensors["quantize.embedding.weight"].detach().float().numpy()
  np.testing.assert_array_equal(params["codebook"], expected)
