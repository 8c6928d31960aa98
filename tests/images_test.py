import jax
import numpy as np

from llamagen_jax.images import grid, resize_bicubic, save_npz, to_uint8
from tests import parity


def test_bicubic_resizing_equals_the_original():
  golden = parity.golden()
  resized = jax.jit(resize_bicubic, static_argnums=1)(golden["bicubic_in"], 16)
  np.testing.assert_allclose(resized, golden["bicubic_out"], atol=2e-6)


def test_resizing_to_the_same_side_changes_nothing():
  images = parity.golden()["bicubic_in"]
  np.testing.assert_array_equal(resize_bicubic(images, 24), images)


def test_the_sides_are_resized_each_by_itself():
  images = parity.golden()["bicubic_in"]
  wide, square = resize_bicubic(images, (16, 24)), resize_bicubic(images, 16)
  assert wide.shape[1:3] == (16, 24)
  np.testing.assert_allclose(resize_bicubic(wide, 16), square, atol=0.2)
  np.testing.assert_array_equal(resize_bicubic(wide, (16, 24)), wide)
  turned = resize_bicubic(images.swapaxes(1, 2), (24, 16)).swapaxes(1, 2)
  np.testing.assert_allclose(turned, wide, atol=2e-6)


def test_uint8_conversion_equals_the_original():
  golden = parity.golden()
  found = to_uint8(golden["uint8_in"])
  np.testing.assert_array_equal(found, golden["uint8_out"])


def test_an_npz_written_in_parts(tmp_path):
  images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
  labels = np.arange(5, dtype=np.int32)
  save_npz(tmp_path / "a.npz", [images[:3], images[3:]], 5, labels)
  save_npz(tmp_path / "b.npz", iter([images]), 5, labels)
  save_npz(tmp_path / "c.npz", [images], 5, None)
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
  with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "c.npz") as c:
    np.testing.assert_array_equal(a["arr_0"], images)
    np.testing.assert_array_equal(a["arr_1"], labels)
    assert c.files == ["arr_0"]


def test_labels_of_a_grid_do_not_reach_into_each_other():
  images = np.zeros((2, 16, 40, 3), np.uint8)
  for label in ("a", "a name that is much too long"):
    above = np.asarray(grid(images, 2, [label, ""]))[:-16]
    assert (above[:, :40] < 128).any()
    assert (above[:, 40:] == 255).all()
