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


@pytest.fixture
def rows():
  return parity.randn("perturb/rows", (64, 4))


def test_some_codes_become_near_ones(rows):
  config = codebook.CodebookConfig(
    perturbed_images=0.5, perturbed_codes=(1.0, 0.5), perturbation_steps=(10, 20),
    perturbation_rows=3,
  )  # fmt: skip
  codes = parity.randint("perturb/codes", 64, (64, 4, 4))
  key = jax.random.key(0)

  def perturbed(step):
    return np.asarray(codebook.perturb(config, rows[codes], rows, step, key))

  distances = np.linalg.norm(rows[:, None] - rows, axis=-1)
  nearest = np.argsort(distances, axis=1)[:, :3]  # a row itself is the first
  found = np.linalg.norm(perturbed(0)[..., None, :] - rows, axis=-1).argmin(axis=-1)
  assert (found[..., None] == nearest[codes]).any(axis=-1).all()
  changed = found != codes
  images = changed.any(axis=(1, 2))
  assert 0.3 < images.mean() < 0.7  # one of the three rows is the code itself
  assert changed[images].mean() == pytest.approx(2 / 3, abs=0.1)
  later = perturbed(20)
  moved = (later != rows[codes]).any(axis=-1)
  assert moved[images].mean() == pytest.approx(1 / 3, abs=0.1)
  np.testing.assert_array_equal(perturbed(99), later)
  assert not (moved & ~images[:, None, None]).any()


def test_gradients_pass_a_replaced_code(rows):
  config = codebook.CodebookConfig(perturbed_images=1.0)
  weight = parity.randn("perturb/weight", (2, 4, 4, 4))
  codes = parity.randint("perturb/codes", 64, (2, 4, 4))

  def loss(z_q):
    rows_seen = codebook.perturb(config, z_q, rows, 0, jax.random.key(1))
    return jnp.sum(rows_seen * weight)

  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(rows[codes])), weight)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("perturbed_images", 1.5, "expected shares"),
    ("perturbed_codes", (1.0,), "expected shares"),
    ("perturbation_steps", (9, 3), "a first and a last step"),
    ("perturbation_rows", 0, "perturbation_rows >= 1"),
  ],
)
def test_wrong_perturbations_are_named(field, value, message):
  with pytest.raises(UserError, match=message):
    codebook.CodebookConfig(**{field: value})
