"""Tokenizers of every layout in the verbs that use one."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import TokenizerConfig
from llamagen_jax.commands import cli
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from llamagen_jax.weights.published import published_tokenizer
from tests import tiny

MASKGIT = dataclasses.replace(
  tiny.TOKENIZER, blocks="maskgit", quant_conv=False, pixel_range="unit", l2_norm=False,
  codebook_dim=tiny.TOKENIZER.latent_width,
)  # fmt: skip
CONFIGS = {
  "llamagen": tiny.TOKENIZER,
  "ibq": dataclasses.replace(
    tiny.TOKENIZER, quantizer="ibq", l2_norm=False, codebook_size=70_000
  ),
  "maskgit": MASKGIT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("peers")
  tiny.write_images(folder / "images", 6)
  for name, config in CONFIGS.items():
    params = unbox(init_tokenizer(config, jax.random.key(0)))
    bundle.save_tokenizer(folder / name, config, params)
  return folder


def run(command: str) -> None:
  assert cli.run(command.split()) == 0, command


def test_one_table_and_one_grid(folder, capsys):
  bundles = " ".join(str(folder / name) for name in CONFIGS)
  flags = f"--source=folder:{folder}/images --image-size=16 --shown=2 --batch-size=3"
  run(f"compare-tokenizers --tokenizer {bundles} {flags} --out={folder}/out")
  rows = json.loads((folder / "out" / "comparison.json").read_text())
  assert list(rows) == list(CONFIGS)
  for name, row in rows.items():
    metrics = json.loads((folder / "out" / name / "metrics.json").read_text())
    assert row["psnr"] == metrics["psnr"] and row["encode"] > 0 < row["decode"]
  assert rows["llamagen"]["bits_a_pixel"] == 4 / 4  # 16 codes, one for 2x2 pixels
  table = (folder / "out" / "comparison.md").read_text()
  assert table in capsys.readouterr().out
  assert len(table.splitlines()) == 5 and "| ibq | 70000 |" in table
  with Image.open(folder / "out" / "comparison.png") as image:
    assert image.size == (7 * 18 - 2, 2 * (16 + 14 + 2) - 2)
    pixels = np.asarray(image)
  originals = np.load(folder / "out" / "ibq" / "originals.npz")["arr_0"]
  np.testing.assert_array_equal(pixels[14:30, :16], originals[0])


def test_names_have_to_differ(folder, capsys):
  command = f"compare-tokenizers --tokenizer {folder}/ibq x/ibq/bundle --image-size=16"
  code = cli.run(f"{command} --source=folder:{folder}/images --out=x".split())
  assert code == 2 and "folders of the same name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ibq", "maskgit"])
def test_from_images_to_samples(folder, name):
  """IBQ's codes need more than 16 bits here."""
  codes = folder / f"codes_{name}"
  run(
    f"extract-codes --tokenizer={folder}/{name} --source=folder:{folder}/images"
    f" --out={codes} --image-size=16 --shards=2 --batch-size=3"
  )
  found = np.stack(
    [record.codes for record in map(CodeSource(codes).__getitem__, range(6))]
  )
  assert (found.max() > 65_535) == (name == "ibq")
  assert found.shape[2] == 64 and len(np.unique(found)) > 8
  config = tiny.gpt_config(codes, 2, batch_size=2)
  config.model.update(grid=8, vocab_size=CONFIGS[name].codebook_size, num_classes=2)
  tiny.write_config(folder / f"{name}.py", config)
  run(f"train-gpt --config={folder}/{name}.py --workdir={folder}/gpt_{name}")
  run(
    f"sample --gpt={folder}/gpt_{name}/bundle --tokenizer={folder}/{name}"
    f" --classes=0,1 --out={folder}/{name}.npz"
  )
  assert np.load(folder / f"{name}.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_published_tokenizers_are_known_by_their_shape():
  name, scores = published_tokenizer(TokenizerConfig.preset("VQ-16"))
  assert name == "LlamaGen VQ-16" and scores["rFID"] == 2.19
  wide = TokenizerConfig.preset("VQ-16", l2_norm=False, codebook_dim=256)
  assert published_tokenizer(wide)[0] == "VQGAN f16 16384"
  assert published_tokenizer(tiny.TOKENIZER) == ("", {})
