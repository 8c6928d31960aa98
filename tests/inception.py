import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

from llamagen_jax.evaluation import cached_features
from llamagen_jax.vision.inception import Features
from tests import parity


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
  """A file of synthesized weights, by the names of the published one."""
  path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
  save_file(parity.synthesize(parity.eval_manifest()["inception_2015"]), path)
  return path


@pytest.fixture
def cheap(monkeypatch):
  """Means of images in Inception's place; the list of its calls."""

  def network(params, images):
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2))
    calls.append(len(images))
    return Features(jnp.tile(mean, (1, 683))[:, :2048], mean, mean)

  calls = []
  monkeypatch.setattr(cached_features, "extract_features", network)
  return calls
