"""Weights of other formats."""

from llamagen_jax.weights.files import read_weights as read_weights
from llamagen_jax.weights.gpt import gpt_from_torch as gpt_from_torch
from llamagen_jax.weights.gpt import gpt_to_torch as gpt_to_torch
from llamagen_jax.weights.tokenizer import tokenizer_from_torch as tokenizer_from_torch
from llamagen_jax.weights.tokenizer import tokenizer_to_torch as tokenizer_to_torch
