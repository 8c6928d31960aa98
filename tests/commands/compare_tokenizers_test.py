"""Tokenizers of every layout in the verbs that use one."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import TokenizerConfig
from llamagen_jax.commands import cli, compare_tokenizers
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from llamagen_jax.weights.published import published_tokenizers
from tests import tiny

MASKGIT = dataclasses.replace(
  tiny.TOKENIZER, blocks="maskgit", quant_conv=False, pixel_range="unit", l2_norm=False,
  codebook_dim=tiny.TOKENIZER.latent_width,
)  # fmt: skip
VAE = dataclasses.replace(
  tiny.TOKENIZER, blocks="ldm", quantizer="none", codebook_size=0, l2_norm=False
)
CONFIGS = {
  "llamagen": tiny.TOKENIZER,
  "ibq": dataclasses.replace(
    tiny.TOKENIZER, quantizer="ibq", l2_norm=False, codebook_size=70_000
  ),
  "maskgit": MASKGIT,
  "vae": VAE,
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
    assert ("usage" in metrics) == ("bits_a_pixel" in row) == (name != "vae")
  assert rows["llamagen"]["bits_a_pixel"] == 4 / 4  # 16 codes, one for 2x2 pixels
  table = (folder / "out" / "comparison.md").read_text()
  assert table in capsys.readouterr().out
  assert len(table.splitlines()) == 6 and "| ibq | 70000 |" in table
  vae = table.splitlines()[-1].split(" | ")
  assert vae[:3] == ["| vae", "-", "-"] and float(vae[3]) == round(row["psnr"], 2)
  with Image.open(folder / "out" / "comparison.png") as image:
    assert image.size == (9 * 18 - 2, 2 * (16 + 14 + 2) - 2)
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


@pytest.mark.parametrize(
  "command",
  [
    "extract-codes --tokenizer={0}/vae --source=folder:{0}/images --image-size=16",
    "import-codes --tokenizer={0}/vae --source=npy:{0}/no_codes",
    "import-weights --hub=c2i_B_256 --tokenizer={0}/vae",
  ],
)
def test_a_vae_gives_no_codes(folder, capsys, command):
  out = folder / "refused"
  assert cli.run([*command.format(folder).split(), f"--out={out}"]) == 2
  text = capsys.readouterr().err
  assert f"--tokenizer={folder}/vae: a continuous autoencoder has no codes" in text
  assert len(text.strip().splitlines()) == 1 and not out.exists()


def test_a_vae_is_not_trained(folder, capsys):
  config = tiny.tokenizer_config(folder / "images", 2)
  config.model.update(quantizer="none", codebook_size=0)
  tiny.write_config(folder / "vae.py", config)
  command = f"train-tokenizer --config={folder}/vae.py --workdir={folder}/run"
  assert cli.run(command.split()) == 2
  text = capsys.readouterr().err
  assert "model.quantizer='none': a continuous autoencoder has no codes" in text


def test_published_tokenizers_are_known_by_their_shape():
  scores = published_tokenizers(TokenizerConfig.preset("VQ-16"))
  assert scores["LlamaGen VQ-16"]["rFID"] == 2.19
  wide = TokenizerConfig.preset("VQ-16", l2_norm=False, codebook_dim=256)
  assert list(published_tokenizers(wide)) == ["VQGAN f16 16384"]
  assert published_tokenizers(tiny.TOKENIZER) == {}


def test_what_two_published_ones_scored_is_shown_together():
  config = TokenizerConfig(
    (1, 2, 4, 4), latent_width=4, codebook_dim=4, blocks="ldm", quantizer="none",
    codebook_size=0, l2_norm=False,
  )  # fmt: skip
  row = {"psnr": 25.0, "ssim": 0.7, "published": published_tokenizers(config)}
  line = compare_tokenizers.table({"vae": row}).splitlines()[-1]
  assert line == "| vae | 25.00 (25.68 or 26.04) | 0.7000 | SD VAE or SDXL VAE |"
