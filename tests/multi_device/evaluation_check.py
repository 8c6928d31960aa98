"""Eight devices find what one does."""

import numpy as np

from llamagen_jax.evaluation.cached_features import CachedImageMap, Extractor
from llamagen_jax.evaluation.clip_score import ClipScorer
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.images import save_npz
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.weights.inception import inception_from_torch
from tests import parity
from tests.multi_device.sampling_check import one_device
from tests.vision import clip_test

COUNT = 11  # no multiple of the devices


def test_features(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (COUNT, 20, 20, 3), np.uint8)
  save_npz(tmp_path / "x.npz", [images], COUNT, None)
  source = open_image_set("--samples", tmp_path / "x.npz")
  weights = parity.synthesize(parity.eval_manifest()["inception_2015"])
  params = inception_from_torch(weights)
  found = {
    name: Extractor(params, CachedImageMap(mesh, batch, tmp_path / name))
    for name, mesh, batch in (("one", one_device(), 8), ("eight", make_mesh(), 1))
  }
  assert found["one"].identity == found["eight"].identity
  one, eight = (extract(source, "images") for extract in found.values())
  for kind in ("pool", "spatial"):
    assert len(one[kind]) == COUNT
    assert len(np.unique(one[kind], axis=0)) == COUNT
    scale = np.abs(one[kind]).max()
    np.testing.assert_allclose(eight[kind], one[kind], atol=1e-5 * scale)


def test_clip_score(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (COUNT, 20, 14, 3), np.uint8)
  save_npz(tmp_path / "x.npz", [images], COUNT, None)
  source = open_image_set("--samples", tmp_path / "x.npz")
  clip_test.write_transformers(tmp_path / "clip", vocab_size=526)
  clip_test.write_openai_merges(tmp_path / "clip")
  prompts = [f"the cat {i}" for i in range(COUNT)]
  one, eight = (
    ClipScorer(tmp_path / "clip", CachedImageMap(mesh, batch, tmp_path / name))(
      source, prompts, "a "
    )
    for name, mesh, batch in (("one", one_device(), 8), ("eight", make_mesh(), 1))
  )
  assert len(np.unique(one)) == COUNT
  np.testing.assert_allclose(eight, one, atol=1e-6)
