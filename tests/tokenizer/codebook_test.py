import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.tokenizer import codebook
from llamagen_jax.training import train_tokenizer
from llamagen_jax.training.metrics_log import read_rows
from tests import parity, tiny


def test_the_window_keeps_the_newest_codes():
  window = codebook.empty_window()
  assert codebook.usage(codebook.counts(window, 8))["usage"] == 0
  window = codebook.push(window, jnp.array([[1, 1], [3, 5]]))
  counts = codebook.counts(window, 8)
  np.testing.assert_array_equal(counts, [0, 2, 0, 1, 0, 1, 0, 0])
  found = codebook.usage(counts)
  assert found["usage"] == pytest.approx(3 / 8)
  entropy = 0.5 * np.log(2) + 0.5 * np.log(4)
  assert found["perplexity"] == pytest.approx(np.exp(entropy))
  window = codebook.push(window, jnp.full(codebook.WINDOW - 1, 7))
  counts = codebook.counts(window, 8)
  assert (int(counts[5]), int(counts[7])) == (1, codebook.WINDOW - 1)


def test_kmeans_finds_separate_clusters():
  centres = np.eye(4, dtype=np.float32)
  noise = 0.05 * parity.randn("kmeans", (4, 50, 4))
  latents = (centres[:, None] + noise).reshape(-1, 4)
  latents /= np.linalg.norm(latents, axis=1, keepdims=True)
  rows = codebook.kmeans_rows(latents, 12, jax.random.key(0), sphere=True)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
  distances = np.linalg.norm(latents[:, None] - np.asarray(rows)[None], axis=-1)
  assert distances.min(axis=1).max() < 0.4  # no latent is far from a row


def test_replaced_rows_reach_parameters_and_moments():
  tree = {"codebook": jnp.ones((3, 2)), "kernel": jnp.ones((3, 2))}
  dead = jnp.array([[True], [False], [True]])
  found = codebook.replace_codebook((tree, [tree]), dead, 0.0)
  for part in (found[0], found[1][0]):
    np.testing.assert_array_equal(part["codebook"], [[0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(part["kernel"], tree["kernel"])


def test_an_unknown_start_is_named():
  with pytest.raises(UserError, match="codebook.init='random': expected uniform"):
    codebook.CodebookConfig(init="random")


@pytest.mark.slow
def test_a_run_with_both_cures_uses_more_of_its_codebook(tmp_path):
  images = tiny.write_images(tmp_path / "images")
  usage = {}
  for name, section in (
    ("off", {}), ("on", {"init": "kmeans", "restart_every": 2}),
  ):  # fmt: skip
    config = tiny.tokenizer_config(images, 4)
    config.loss.adversarial_weight = 0.0
    config.model.codebook_size = 512
    config.codebook = section
    train_tokenizer.train(config, tmp_path / name)
    usage[name] = read_rows(tmp_path / name / "metrics.jsonl")[-1]["eval/usage"]
  assert usage["on"] > usage["off"]
