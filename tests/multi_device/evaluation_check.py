"""Eight devices find the features that one does."""

import numpy as np

from llamagen_jax.evaluation.features import Extractor, PictureValues
from llamagen_jax.evaluation.sources import open_source
from llamagen_jax.interop.inception import inception_from_torch
from llamagen_jax.pictures import save_npz
from llamagen_jax.training.mesh import make_mesh
from tests import parity
from tests.multi_device.sampling_check import one_device

COUNT = 11  # no multiple of the devices


def test_features(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (COUNT, 20, 20, 3), np.uint8)
  save_npz(tmp_path / "x.npz", [images], COUNT, None)
  source = open_source("--samples", tmp_path / "x.npz")
  weights = parity.synthesize(parity.eval_manifest()["inception_2015"])
  params = inception_from_torch(weights)
  found = {
    name: Extractor(params, PictureValues(mesh, batch, tmp_path / name))
    for name, mesh, batch in (("one", one_device(), 8), ("eight", make_mesh(), 1))
  }
  assert found["one"].identity == found["eight"].identity
  one, eight = (extract(source, "pictures") for extract in found.values())
  for kind in ("pool", "spatial"):
    assert len(one[kind]) == COUNT
    assert len(np.unique(one[kind], axis=0)) == COUNT
    scale = np.abs(one[kind]).max()
    np.testing.assert_allclose(eight[kind], one[kind], atol=1e-5 * scale)
