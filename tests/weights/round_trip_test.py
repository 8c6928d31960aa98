import numpy as np
import pytest

from llamagen_jax import UserError, weights
from tests import parity


def gpt_tiny(name: str):
  state_dict = parity.state_dict(name)
  return state_dict, *weights.gpt_from_torch(state_dict, num_heads=4, image_tokens=16)


@pytest.mark.parametrize("name", ["gpt_tiny_c2i", "gpt_tiny_gqa", "gpt_tiny_t2i"])
def test_gpt_round_trip_is_the_identity(name):
  state_dict, config, params = gpt_tiny(name)
  back = weights.gpt_to_torch(config, params)
  assert back.keys() == state_dict.keys()
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_tokenizer_round_trip_is_the_identity(name):
  state_dict = parity.state_dict(name)
  back = weights.tokenizer_to_torch(*weights.tokenizer_from_torch(state_dict))
  assert back.keys() == state_dict.keys()
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["vae", "vae_bare"])
def test_a_vae_is_written_as_ldm_has_it(name):
  layouts = parity.vae_state_dicts(name)
  back = weights.tokenizer_to_torch(
    *weights.tokenizer_from_torch(layouts["diffusers"], kind="diffusers")
  )
  assert back.keys() == layouts["kl"].keys()
  for key, value in layouts["kl"].items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_all_problems_are_reported_together():
  state_dict = parity.state_dict("gpt_tiny_c2i")
  del state_dict["layers.1.attention.wo.weight"]
  state_dict["norm.weight"] = np.zeros(63, np.float32)
  state_dict["surprise"] = np.zeros(2, np.float32)
  with pytest.raises(UserError) as error:
    weights.gpt_from_torch(state_dict, num_heads=4, image_tokens=16)
  message = str(error.value)
  assert "3 problems" in message and "\n" not in message
  assert "missing layers.1.attention.wo.weight (64, 64)" in message
  assert "norm.weight is (63,), expected (64,)" in message
  assert "unexpected surprise (2,)" in message


def test_recomputed_buffers_are_ignored():
  state_dict = parity.state_dict("gpt_tiny_c2i")
  state_dict["freqs_cis"] = np.zeros((17, 8, 2), np.float32)
  state_dict["layers.0.attention.causal_mask"] = np.zeros((17, 17), bool)
  config, _ = weights.gpt_from_torch(state_dict, num_heads=4, image_tokens=16)
  assert config.layers == 2


def test_what_shapes_cannot_tell_is_asked_for():
  with pytest.raises(UserError, match="2 layers of width 64.*num_heads"):
    weights.gpt_from_torch(parity.state_dict("gpt_tiny_c2i"))
  with pytest.raises(UserError, match="tok_embeddings.weight"):
    weights.gpt_from_torch(parity.state_dict("quantizer_256x8"))
