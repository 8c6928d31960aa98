"""The cache of features, with a network in Inception's place that costs nothing."""

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from llamagen_jax.data.images import center_crop
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation import cached_features
from llamagen_jax.evaluation.cached_features import CachedImageMap, Extractor
from llamagen_jax.evaluation.image_sets import open_image_set
from llamagen_jax.images import save_npz
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.vision.inception import Features

COUNT = 10
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 8, 3), np.uint8)
PARAMS = {"head": np.ones((2, 3), np.float32)}


class Network:
  """Means of images; counts its calls, and is killed at one of them."""

  calls, killed_at = 0, None

  def __call__(self, params, images):
    self.calls += 1
    if self.calls == self.killed_at:
      raise KeyboardInterrupt
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2))
    return Features(mean[:, :2], mean, mean @ jnp.ones((3, 3)))


@pytest.fixture
def network(monkeypatch):
  network = Network()
  monkeypatch.setattr(cached_features, "extract_features", network)
  monkeypatch.setattr(cached_features, "SHARD_IMAGES", 4)
  return network


def write_npz(path, images):
  save_npz(path, [images], len(images), None)
  return open_image_set("--samples", path)


def extractor(folder, params=PARAMS):
  return Extractor(params, CachedImageMap(make_mesh(), 3, folder / "cache"))


def test_features_are_kept_by_content(network, tmp_path):
  source = write_npz(tmp_path / "x.npz", IMAGES)
  found = extractor(tmp_path)(source, "x")
  expected = IMAGES.astype(np.float64).mean(axis=(1, 2))
  np.testing.assert_allclose(found["spatial"], expected, rtol=1e-6)
  np.testing.assert_allclose(found["pool"], expected[:, :2], rtol=1e-6)
  calls = network.calls

  # The same bytes elsewhere are known; others, and other weights, are not.
  same = write_npz(tmp_path / "y.npz", IMAGES)
  np.testing.assert_array_equal(extractor(tmp_path)(same, "y")["pool"], found["pool"])
  assert network.calls == calls
  other = extractor(tmp_path)(write_npz(tmp_path / "x.npz", IMAGES[::-1]), "x")
  assert network.calls == 2 * calls
  np.testing.assert_array_equal(other["pool"], found["pool"][::-1])
  extractor(tmp_path, {"head": PARAMS["head"] * 2})(same, "y")
  assert network.calls == 3 * calls


@pytest.mark.extra
def test_a_cache_in_a_bucket(network, tmp_path, bucket):
  source = write_npz(tmp_path / "x.npz", IMAGES)
  found = extractor(bucket)(source, "x")
  calls = network.calls
  np.testing.assert_array_equal(extractor(bucket)(source, "x")["pool"], found["pool"])
  assert network.calls == calls


def test_a_killed_run_goes_on(network, tmp_path):
  source = write_npz(tmp_path / "x.npz", IMAGES)
  whole = extractor(tmp_path / "whole")(source, "x")
  calls = network.calls
  network.calls, network.killed_at = 0, calls - 1
  with pytest.raises(KeyboardInterrupt):
    extractor(tmp_path)(source, "x")
  network.calls, network.killed_at = 0, None
  resumed = extractor(tmp_path)(source, "x")
  assert network.calls < calls
  for kind, value in whole.items():
    np.testing.assert_array_equal(resumed[kind], value)


def test_a_folder_has_the_features_of_its_npz(network, tmp_path):
  (tmp_path / "png").mkdir()
  for i, image in enumerate(IMAGES):
    Image.fromarray(image).save(tmp_path / "png" / f"{i:03d}.png")
  png = extractor(tmp_path)(open_image_set("--samples", tmp_path / "png"), "png")
  npz = extractor(tmp_path)(write_npz(tmp_path / "x.npz", IMAGES), "npz")
  np.testing.assert_array_equal(png["pool"], npz["pool"])


def test_files_of_any_size_are_cropped_where_asked(network, tmp_path):
  folder = tmp_path / "jpg"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i, shape in enumerate(((40, 60, 3), (90, 35, 3), (33, 33))):
    image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    image.save(folder / f"{i}.jpg")
  with pytest.raises(UserError, match="several sizes"):
    open_image_set("--reference", folder)
  sources = [open_image_set("--reference", folder, crop) for crop in (16, 32)]
  assert [source.size for source in sources] == [(16, 16), (32, 32)]
  assert sources[0].sha256 != sources[1].sha256
  (images,) = sources[1].batches(3)
  with Image.open(folder / "1.jpg") as image:
    np.testing.assert_array_equal(images[1], center_crop(image, 32))
  assert len(extractor(tmp_path)(sources[0], "x")["pool"]) == 3


def test_broken_folders_are_refused(network, tmp_path):
  folder = tmp_path / "png"
  folder.mkdir()
  with pytest.raises(UserError, match="no images"):
    open_image_set("--samples", folder)
  for side in (8, 9):
    Image.new("RGB", (side, 8)).save(folder / f"{side}.png")
  with pytest.raises(UserError, match=r"8.png is \(8, 8\) and .*9.png \(8, 9\)"):
    open_image_set("--samples", folder)
  for name in ("8.png", "9.png"):
    Image.fromarray(IMAGES[0]).save(folder / name)
  (folder / "9.png").write_bytes((folder / "8.png").read_bytes()[:-40])
  source = open_image_set("--samples", folder)
  with pytest.raises(UserError, match="9.png: no image that can be read"):
    extractor(tmp_path)(source, "x")


def test_a_short_npz_is_refused(tmp_path):
  save_npz(tmp_path / "x.npz", [IMAGES[:4]], COUNT, None)  # says 10, has 4
  source = open_image_set("--samples", tmp_path / "x.npz")
  with pytest.raises(UserError, match="ends early"):
    list(source.batches(3))
