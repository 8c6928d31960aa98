import dataclasses
import functools

import jax
import numpy as np
import pytest

from llamagen_jax import TokenizerConfig, UserError, VQModel, weights
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer import model
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights.tokenizer import tokenizer_kind
from tests import parity


@pytest.mark.parametrize("name, side", [("VQ-16", 64), ("VQ-8", 32)])
def test_published_tokenizers_equal_the_original(name, side):
  golden = parity.golden()
  config, params = weights.tokenizer_from_torch(parity.state_dict(name))
  assert config == TokenizerConfig.preset(name)
  images = np.tanh(parity.randn(f"{name}/image", (2, 3, side, side)))
  images = images.transpose(0, 2, 3, 1)

  @functools.partial(jax.jit, static_argnames="method")
  def applied(params, x, method):
    return VQModel(config).apply({"params": params}, x, method=method)

  apply = functools.partial(applied, params)

  latents = apply(images, "latents")
  np.testing.assert_allclose(latents, golden[f"{name}_latent"], atol=2e-4)
  codes = apply(images, "encode")
  np.testing.assert_array_equal(codes, golden[f"{name}_indices"])
  np.testing.assert_allclose(apply(codes, "decode"), golden[f"{name}_recon"], atol=2e-4)
  codes = parity.randint(f"{name}/codes", 16384, (2, 16)).reshape(2, 4, 4)
  expected = golden[f"{name}_decode_code"]
  np.testing.assert_allclose(apply(codes, "decode"), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_presets_take_shape(name):
  config = TokenizerConfig.preset(name)
  shapes = unbox(
    jax.eval_shape(functools.partial(init_tokenizer, config), jax.random.key(0))
  )
  expected = parity.manifest()["state_dicts"][name]
  found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert found == sum(int(np.prod(shape)) for shape in expected.values())


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: TokenizerConfig.preset("VQ-32"), ["'VQ-32'", "VQ-16"]),
    (lambda: TokenizerConfig((1, 2), width=20), ["model.norm_groups=32", "20"]),
    (lambda: TokenizerConfig((1,), codebook_size=2**31), [str(2**31), "2 .. 2147"]),
    (lambda: TokenizerConfig((1,), blocks="x"), ["model.blocks='x'", "maskgit"]),
    (lambda: TokenizerConfig((1,), quant_conv=False), ["model.latent_width=256"]),
    (lambda: TokenizerConfig((1,), quantizer="none"), ["codebook_size=16384", "0"]),
    (lambda: TokenizerConfig((1,), codebook_size=0), ["codebook_size=0", "2 .. "]),
  ],
)
def test_bad_shapes_are_named(make, words):
  with pytest.raises(UserError) as error:
    make()
  assert all(word in str(error.value) for word in words)


def test_enlarging_convolution_equals_enlarging_and_convolving():
  x_BHWC = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 7))
  axes = jax.lax.conv_dimension_numbers(
    x_BHWC.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")
  )
  large = x_BHWC.repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_allclose(
    model.convolve_upsampled(x_BHWC, kernel),
    jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=axes),
    atol=1e-5,
  )


def test_fields_of_later_versions_leave_identities_alone():
  """Code shards name the tokenizer by it."""
  config = dataclasses.replace(TokenizerConfig.preset("VQ-16"), width=32)
  assert set(config.identity_fields) == {
    "channel_multipliers", "width", "res_blocks", "latent_width", "codebook_size",
    "codebook_dim", "l2_norm", "norm_groups", "dropout", "commitment",
    "entropy_ratio", "dtype", "remat",
  }  # fmt: skip
  other = dataclasses.replace(config, quantizer="ibq")
  assert other.identity_fields["quantizer"] == "ibq"


PEERS = {
  "taming_f16": ("taming", {"l2_norm": False, "codebook_dim": 40}),
  "taming_f8": ("taming", {"codebook_dim": 4, "channel_multipliers": (1, 2, 2, 4)}),
  "ibq_f16": ("ibq", {"res_blocks": 4, "quantizer": "ibq"}),
  "maskgit_f16": ("maskgit", {"blocks": "maskgit", "quant_conv": False}),
}


@pytest.mark.parametrize("name", PEERS)
def test_tokenizers_of_others_equal_theirs(name):
  golden, (kind, fields) = parity.golden(), PEERS[name]
  state_dict = parity.synthesize(parity.beyond_manifest()[name])
  assert tokenizer_kind(state_dict) == kind
  config, params = weights.tokenizer_from_torch(state_dict, kind=kind)
  assert {k: getattr(config, k) for k in fields} == fields
  images = parity.randn(f"{name}/image", (1, 3, 64, 64)).transpose(0, 2, 3, 1)
  if kind == "maskgit":  # its [0, 1] is our [-1, 1]
    images = 2 / (1 + np.exp(-images)) - 1
    recon = golden[f"{name}_recon_unclipped"] * 2 - 1
  else:
    images, recon = np.tanh(images), golden[f"{name}_recon"]
  run = functools.partial(VQModel(config).apply, {"params": params})
  latents = run(images, method="latents")
  np.testing.assert_allclose(latents, golden[f"{name}_latent"], atol=2e-4)
  codes = model.encode(config, params, images)
  np.testing.assert_array_equal(codes, golden[f"{name}_indices"])
  np.testing.assert_allclose(model.decode(config, params, codes), recon, atol=2e-4)
  if kind == "taming":
    losses = run(images)[1].losses
    expected = golden[f"{name}_quant_losses"][0]
    np.testing.assert_allclose(sum(losses.values()), expected, rtol=1e-5)


# Of the encoder's outputs the first half are means, the second log-variances.
VAES = {
  "vae": {"latent_width": 4, "codebook_dim": 4, "quant_conv": True},
  "vae_bare": {"latent_width": 16, "codebook_dim": 16, "quant_conv": False},
}


@pytest.mark.parametrize("layout", ["diffusers", "kl"])
@pytest.mark.parametrize("name", VAES)
def test_vaes_equal_those_of_diffusers(name, layout):
  golden, state_dict = parity.golden(), parity.vae_state_dicts(name)[layout]
  assert tokenizer_kind(state_dict) == layout
  config, params = weights.tokenizer_from_torch(state_dict, kind=layout)
  assert config == TokenizerConfig(
    (1, 2), width=32, blocks="ldm", quantizer="none", codebook_size=0, l2_norm=False,
    **VAES[name],
  )  # fmt: skip
  images = np.tanh(parity.randn(f"{name}/image", (1, 3, 32, 32))).transpose(0, 2, 3, 1)
  latents = model.encode(config, params, images)
  np.testing.assert_allclose(latents, golden[f"{name}_latent"], atol=2e-4)
  recon = model.decode(config, params, golden[f"{name}_latent"])
  np.testing.assert_allclose(recon, golden[f"{name}_recon"], atol=2e-4)


def test_the_vae_of_stable_diffusion_takes_shape():
  config = TokenizerConfig(
    (1, 2, 4, 4), latent_width=4, codebook_dim=4, blocks="ldm", quantizer="none",
    codebook_size=0,
  )  # fmt: skip
  init = functools.partial(init_tokenizer, config)
  shapes = unbox(jax.eval_shape(init, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863
  assert config.downsample == 8 and "codebook" not in shapes
