"""Verbs on images, folders and class names as people have them."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

NAMES = (*(str(i) for i in range(12)), "Food, Drink", "3-5")
MODEL = dataclasses.replace(
  tiny.GPT, layers=1, vocab_size=16, num_classes=len(NAMES)
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A folder with the bundles tokenizer and gpt, of random weights."""
  folder = tmp_path_factory.mktemp("models")
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "tokenizer", tiny.TOKENIZER, params)
  params = unbox(init_gpt(MODEL, jax.random.key(0)))
  sampling = SamplingConfig(guidance_scale=1.0)
  gpt = bundle.Transformer(MODEL, params, sampling, identity, NAMES)
  bundle.save_gpt(folder / "gpt", gpt)
  return folder


def llamagen(capsys, *argv: str) -> tuple[int, str]:
  code = cli.run(list(argv))
  return code, capsys.readouterr().err.strip().splitlines()[-1:]


def quadrants() -> np.ndarray:
  pixels = np.zeros((32, 32, 4), np.uint8)
  pixels[:16, :16], pixels[:16, 16:] = (255, 0, 0, 255), (0, 255, 0, 255)
  pixels[16:, :16] = (0, 0, 255, 0)  # a hidden colour
  return pixels


def test_codes_of_transparent_and_turned_images_are_those_of_plain_ones(
  models, tmp_path, capsys
):
  white = quadrants()
  white[white[..., 3] == 0] = 255
  plain = Image.fromarray(white[..., :3])
  exif = Image.Exif()
  exif[0x112] = 6
  for name in ("10", "2", ".ipynb_checkpoints", "__MACOSX"):
    (tmp_path / "in" / name).mkdir(parents=True)
    plain.save(tmp_path / "in" / name / "plain.png")
  Image.fromarray(quadrants()).save(tmp_path / "in" / "2" / "alpha.webp", lossless=True)
  turned = plain.transpose(Image.Transpose.ROTATE_90)
  turned.save(tmp_path / "in" / "10" / "turned.png", exif=exif)
  (tmp_path / "in" / "2" / "._plain.png").write_bytes(b"\0\5\x16\7")
  flags = ("--image-size=16", "--crops=center", "--ranges=1", "--no-mirror")
  for out, *more in (("codes",), ("stored", "--ignore-exif", "--background=black")):
    code, err = llamagen(
      capsys, "extract-codes", f"--tokenizer={models}/tokenizer", "--shards=1",
      f"--source=folder:{tmp_path}/in", f"--out={tmp_path}/{out}", *flags, *more,
    )  # fmt: skip
    assert code == 0, err
  codes = CodeSource(tmp_path / "codes")
  assert codes.manifest["class_names"] == ["2", "10"]
  assert codes.manifest["background"] == "white" and not codes.manifest["ignore_exif"]
  keys = [codes[i].key for i in range(len(codes))]
  assert keys == ["2/alpha.webp", "2/plain.png", "10/plain.png", "10/turned.png"]
  assert all((codes[i].codes == codes[0].codes).all() for i in range(4))
  stored = CodeSource(tmp_path / "stored")
  same = [(stored[i].codes == codes[i].codes).all() for i in range(4)]
  assert same == [False, True, True, False]


@pytest.mark.parametrize(
  "flags, labels",
  [
    (["--classes=10"], [10]),
    (["--classes=Food, Drink,3-5, 0"], [12, 13, 0]),
    (["--classes-file={f}/bom.txt"], [11, 12, 2]),
  ],
)
def test_classes_are_asked_for_by_their_names(models, tmp_path, capsys, flags, labels):
  (tmp_path / "bom.txt").write_bytes("\ufeff11\r\nfood, drink\r\n\r\n2\r\n".encode())
  flags = [flag.format(f=tmp_path) for flag in flags]
  code, err = llamagen(
    capsys, "sample", f"--gpt={models}/gpt", f"--tokenizer={models}/tokenizer",
    f"--out={tmp_path}/x.npz", *flags,
  )  # fmt: skip
  assert code == 0, err
  with np.load(tmp_path / "x.npz") as file:
    assert file["arr_1"].tolist() == labels


@pytest.mark.parametrize(
  "flags, words",
  [
    ("sample --classes-file={f}/latin.txt --gpt={m}/gpt --tokenizer={m}/tokenizer"
     " --out={f}/x.png", "latin.txt: byte 3 is 0xe9, expected text in UTF-8"),
    ("evaluate --protocol=custom --samples={f}/bomb --reference={f}/bomb"
     " --inception={f}/none", "0.png: no image that can be read"),
    ("extract-codes --tokenizer={m}/tokenizer --source=folder:{f}/bomb --out={f}/out"
     " --image-size=16 --background=whit", "background='whit': expected a colour"),
    ("extract-codes --tokenizer={m}/tokenizer --source=folder:{f}/bomb --out={f}/out"
     " --image-size=16", "bad image"),
    ("prepare-captions --source=jsonl:{f}/x.jsonl --out={f}/out",
     "--caption-key names one"),
  ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(models, tmp_path, capsys, flags, words):
  (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  (tmp_path / "bomb").mkdir()
  Image.new("1", (17, 20_000)).save(tmp_path / "bomb" / "0.png")
  line = {"image_path": "bomb/0.png", "what": "a"}
  (tmp_path / "x.jsonl").write_text(json.dumps(line))
  argv = flags.format(f=tmp_path, m=models).split()
  code, err = llamagen(capsys, *argv)
  assert code == 2 and words in err[0]
