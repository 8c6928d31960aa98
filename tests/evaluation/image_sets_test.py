"""Sets of images as people have them: odd files are read rightly or refused."""

import io
import zipfile

import numpy as np
from PIL import Image
import pytest

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.clip_score import read_prompts
from llamagen_jax.evaluation.image_sets import open_image_set

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


def write_folder(folder, names):
  for image, name in zip(IMAGES, names, strict=False):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name)


def test_a_folder_is_in_natural_order_and_without_junk(tmp_path):
  names = [f"{i}.png" for i in range(12)]
  write_folder(tmp_path, names)
  (tmp_path / "._3.png").write_bytes(b"twin")
  (tmp_path / "captions.txt").touch()
  source = open_image_set("--samples", tmp_path)
  assert source.count == 12 and source.files == tuple(names)
  np.testing.assert_array_equal(np.concatenate([*source.batches(5)]), IMAGES)


def test_images_in_folders_are_read(tmp_path):
  write_folder(tmp_path, ["b/0.png", "a/10.png", "a/2.png"])
  source = open_image_set("--samples", tmp_path)
  (images,) = source.batches(3)
  np.testing.assert_array_equal(images, IMAGES[[2, 1, 0]])
  write_folder(tmp_path / "flat", ["0.png", "1.png", "2.png"])
  assert source.sha256 != open_image_set("--samples", tmp_path / "flat").sha256


def test_transparency_is_white_and_turned_images_are_upright_or_as_stored(tmp_path):
  exif = Image.Exif()
  exif[0x112] = 6
  image = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
  image.paste((0, 255, 0, 255), (0, 0, 4, 4))
  image.save(tmp_path / "0.png", exif=exif)
  source = open_image_set("--samples", tmp_path)
  (images,) = source.batches(1)
  assert source.size == (8, 4) and images.shape == (1, 8, 4, 3)
  assert images[0, 0, 0].tolist() == [0, 255, 0]
  assert images[0, 7, 0].tolist() == [255, 255, 255]
  stored = open_image_set("--samples", tmp_path, as_stored=True)
  assert stored.size == (4, 8) and stored.sha256 != source.sha256
  np.testing.assert_array_equal(np.rot90(next(stored.batches(1))[0], 3), images[0])


def zeroed_chunk():
  file = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
  Image.fromarray(pixels).save(file, "PNG")
  data = bytearray(file.getvalue())
  second = data.find(b"IDAT", data.find(b"IDAT") + 4)
  data[second : second + 4] = bytes(4)
  return bytes(data)


def bomb():
  file = io.BytesIO()
  Image.new("1", (20_000, 20_000)).save(file, "PNG")
  return file.getvalue()


@pytest.mark.parametrize(
  "image, words", [(zeroed_chunk(), "broken PNG"), (bomb(), "pixels"), (b"x", "known")]
)
def test_broken_images_are_one_line(tmp_path, image, words):
  (tmp_path / "0.png").write_bytes(image)
  with pytest.raises(UserError, match=f"0.png: no image that can be read .*{words}"):
    next(open_image_set("--samples", tmp_path).batches(1))


@pytest.mark.parametrize(
  "labels, words",
  [
    (np.eye(12, dtype=np.float32), r"arr_1 is float32 \(12, 12\), expected integer"),
    (np.arange(11), r"arr_1 is int64 \(11,\), expected integer labels \[12\]"),
    (np.array([None] * 12), "labels or statistics cannot be read .*allow_pickle"),
  ],
)
def test_labels_of_other_kinds_are_one_line(tmp_path, labels, words):
  np.savez(tmp_path / "x.npz", arr_0=IMAGES, arr_1=labels)
  with pytest.raises(UserError, match=f"--samples=.*x.npz: {words}"):
    open_image_set("--samples", tmp_path / "x.npz")


@pytest.mark.parametrize(
  "arrays, words",
  [
    ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "expected floats mu"),
    ({"mu": np.zeros(3)}, "expected floats mu"),
    ({"mu": np.zeros(3, int), "sigma": np.zeros((3, 3))}, "expected floats mu"),
    ({"arr_0": IMAGES[..., 0]}, r"arr_0 is uint8 \(12, 8, 8\)"),
    ({"arr_0": np.array([None])}, "arr_0 is object"),
    ({"arr_0": IMAGES[:0]}, r"arr_0 is uint8 \(0, 8, 8, 3\)"),
    ({"images": IMAGES}, r"has \['images'\], expected arr_0 or mu"),
  ],
)
def test_foreign_arrays_are_one_line(tmp_path, arrays, words):
  np.savez(tmp_path / "x.npz", **arrays)
  with pytest.raises(UserError, match=f"--reference=.*x.npz: .*{words}"):
    open_image_set("--reference", tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["arr_0.npy", "arr_1.npy", "mu.npy"])
def test_broken_members_are_one_line(tmp_path, name):
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.writestr("arr_0.npy", b"")
    archive.writestr(name, b"not an array")
  with pytest.raises(UserError, match=r"x.npz: .*cannot be read"):
    open_image_set("--samples", tmp_path / "x.npz")


@pytest.mark.parametrize(
  "text, words",
  [("[]", "not the settings"), ('{"sampling": 3}', "not the settings"),
   ('{"sampled_size": [1]}', "not the settings"), ("{", "not JSON")],
)  # fmt: skip
def test_settings_of_another_program_are_one_line(tmp_path, text, words):
  np.savez(tmp_path / "x.npz", arr_0=IMAGES)
  source = open_image_set("--samples", tmp_path / "x.npz")
  assert source.settings is None
  (tmp_path / "x.json").write_text(text)
  with pytest.raises(UserError, match=f"x.json: {words}"):
    source.settings  # noqa: B018


def test_prompts_are_paired_in_natural_order(tmp_path):
  write_folder(tmp_path, [f"{i}.png" for i in range(12)])
  lines = "".join(f"caption {i}\u2028x\r\n" for i in range(12))
  (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
  source = open_image_set("--samples", tmp_path)
  prompts = read_prompts(None, source)
  assert source.files[2] == "2.png" and prompts[2] == "caption 2\u2028x"
  (tmp_path / "captions.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(UserError, match="captions.txt: byte 3 is 0xe9"):
    read_prompts(None, source)
