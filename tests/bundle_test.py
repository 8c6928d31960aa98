"""A tokenizer bundle, as programs call it."""

import jax
import numpy as np

from llamagen_jax import pictures
from llamagen_jax.bundle import Tokenizer
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training.mesh import unbox
from tests import tiny


def test_bytes_and_floats_of_a_picture_have_the_same_codes():
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  tokenizer = Tokenizer(tiny.TOKENIZER, params, "tiny")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
  codes = tokenizer.encode(images)
  assert len(np.unique(codes)) > 1
  np.testing.assert_array_equal(codes, tokenizer.encode(pictures.from_uint8(images)))
