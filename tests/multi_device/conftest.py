"""What the checks of training share."""

import jax
import pytest

from tests import tiny


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
  assert jax.device_count() == 8
  return tiny.write_codes(tmp_path_factory.mktemp("codes"))
