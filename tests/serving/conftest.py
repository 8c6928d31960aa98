"""A model that the servers of several files share."""

import pytest


@pytest.fixture(scope="session")
def image_model():
  """A compiled tiny model. Each server gives it a fake engine of its own."""
  pytest.importorskip("httpx")
  pytest.importorskip("uvicorn")
  from tests.serving import live

  model = live.tiny_model()
  model.warm_up()
  return model
