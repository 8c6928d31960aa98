import pytest
from safetensors.numpy import save_file

from tests import parity


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
  """A file of synthesized weights, by the names of the published one."""
  path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
  save_file(parity.synthesize(parity.eval_manifest()["inception_2015"]), path)
  return path
