"""Prompts: files, features, negative prompts, and the folder that is written."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import generate
from llamagen_jax.commands import cli
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.sampling.prompts import Prompts, read_prompts
from llamagen_jax.text.t5 import T5Config, init_t5
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from llamagen_jax.weights.t5 import load_t5
from tests import tiny

T5 = T5Config(60, 16, layers=1, heads=2, head_dim=8, ffn_dim=16)
MODEL = dataclasses.replace(
  tiny.GPT, layers=1, vocab_size=16, condition="caption", caption_tokens=10,
  caption_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prompts")
  t5 = jax.device_get(unbox(init_t5(T5, jax.random.key(0))))
  tiny.write_t5(folder / "t5", T5, t5)
  encoder = load_t5(folder / "t5", dtype="float32")
  tokenizer = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "tokenizer", tiny.TOKENIZER, tokenizer)
  params = unbox(init_gpt(MODEL, jax.random.key(0)))
  params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)
  sampling = SamplingConfig(guidance_scale=2.0)
  gpt = bundle.Transformer(MODEL, params, sampling, identity, (), encoder.identity)
  bundle.save_gpt(folder / "gpt", gpt)
  return folder, gpt, encoder


def test_features_do_not_depend_on_the_batch(run):
  _, gpt, encoder = run
  texts = ["two blue birds", "a cat", "two blue birds"]
  prompts = Prompts.of(gpt, encoder, texts)
  features, mask = prompts.take(np.arange(3))
  np.testing.assert_array_equal(features[0], features[2])
  assert mask.sum(axis=1)[0] == mask.sum(axis=1)[2] != mask.sum(axis=1)[1]
  alone, alone_mask = prompts.take(np.array([1]))
  np.testing.assert_allclose(alone[0], features[1], atol=1e-5)
  np.testing.assert_array_equal(alone_mask[0], mask[1])


def test_negative_prompts(run):
  """A negative prompt takes the place of the unconditional embedding."""
  _, gpt, encoder = run
  texts = ("a red fox on a green hill", "a cat")
  condition, mask = Prompts.of(gpt, encoder, texts).take(np.arange(2))
  pair, pair_mask = Prompts.of(gpt, encoder, texts, "two birds").take(np.arange(2))
  assert pair.shape == (2, 2, 10, 16)
  np.testing.assert_allclose(pair[:, 0], condition, atol=1e-6)
  greedy = SamplingConfig(guidance_scale=5.0, greedy=True)

  def codes(condition, mask, sampling=greedy):
    key = jax.random.key(0)
    return generate(MODEL, gpt.params, condition, key, mask, sampling)

  plain = codes(condition, mask)
  assert (codes(pair, pair_mask) != plain).any()
  # The unconditional embedding given as the second of a pair is what guidance has.
  fixed = np.asarray(gpt.params["condition"]["unconditional"])
  same = np.stack([condition, np.broadcast_to(fixed, condition.shape)], axis=1)
  same_mask = np.stack([mask, mask], axis=1)
  np.testing.assert_array_equal(codes(same, same_mask), plain)
  alone = dataclasses.replace(greedy, guidance_scale=1.0)
  np.testing.assert_array_equal(
    codes(pair, pair_mask, alone), codes(condition, mask, alone)
  )


def test_files(tmp_path):
  (tmp_path / "a.txt").write_text("one, two\n\n  three \n")
  assert read_prompts(f"{tmp_path}/a.txt") == ["one, two", "three"]
  (tmp_path / "parti.tsv").write_text('Prompt\tCategory\na "b"\tx\nc, d\ty\n')
  assert read_prompts(f"{tmp_path}/parti.tsv") == ['a "b"', "c, d"]
  assert read_prompts(f"{tmp_path}/parti.tsv:Category") == ["x", "y"]
  (tmp_path / "a.csv").write_text('id,caption\n1,"a, b"\n2,\n')
  assert read_prompts(f"{tmp_path}/a.csv") == ["a, b"]
  with pytest.raises(UserError, match="no column x; its columns are id, caption"):
    read_prompts(f"{tmp_path}/a.csv:x")


def llamagen(capsys, folder, flags: list[str]) -> tuple[int, str]:
  command = ["sample", f"--gpt={folder}/gpt", f"--tokenizer={folder}/tokenizer"]
  code = cli.run([*command, *flags])
  return code, capsys.readouterr().err.strip().splitlines()[-1:]


def test_the_verb_writes_images_and_captions_in_one_order(run, tmp_path, capsys):
  folder = run[0]
  out = tmp_path / "out"
  flags = [f"--t5={folder}/t5", f"--out={out}", "--count=2", "--temperature=9"]
  code, err = llamagen(capsys, folder, [*flags, "--prompts", "a cat", "two birds"])
  assert code == 0, err
  names = sorted(path.name for path in out.glob("*.png"))
  assert names == [f"{i:05d}.png" for i in range(4)]
  lines = (out / "captions.txt").read_text().splitlines()
  assert lines == ["a cat", "a cat", "two birds", "two birds"]
  first = np.asarray(Image.open(out / names[0]))
  assert (first != np.asarray(Image.open(out / names[1]))).any()


def test_the_verb_reads_files_and_negative_prompts(run, tmp_path, capsys):
  folder = run[0]
  (tmp_path / "p.tsv").write_text("Prompt\tOther\na cat\tx\ntwo birds\ty\n")
  (tmp_path / "p.csv").write_text('id,text\n1,a cat\n2,"two birds"\n')
  (tmp_path / "p.txt").write_text("a cat\n\ntwo birds\n")
  drawn = {}
  for name, spec, *flags in (
    ("given", "p.txt"),
    ("tsv", "p.tsv:Prompt"),
    ("csv", "p.csv"),
    ("negative", "p.txt", "--negative-prompt=an old man reads a small book"),
  ):
    out = tmp_path / name
    words = [f"--prompt-file={tmp_path}/{spec}", f"--t5={folder}/t5", f"--out={out}"]
    code, err = llamagen(capsys, folder, [*words, *flags, "--guidance-scale=5"])
    assert code == 0, err
    assert (out / "captions.txt").read_text() == "a cat\ntwo birds\n"
    drawn[name] = [path.read_bytes() for path in sorted(out.glob("*.png"))]
    assert len(drawn[name]) == 2
  assert drawn["given"] == drawn["tsv"] == drawn["csv"] != drawn["negative"]


def test_a_folder_is_drawn_into_again(run, tmp_path, capsys):
  flags = [f"--t5={run[0]}/t5", f"--out={tmp_path}/out", "--prompts"]
  for prompt in ("a cat", "two birds"):
    code, err = llamagen(capsys, run[0], [*flags, prompt])
    assert code == 0, err
    assert (tmp_path / "out" / "captions.txt").read_text() == f"{prompt}\n"


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--prompts", "a"], "prompts need --t5"),
    (["--prompt-file=x.txt", "--t5={f}/t5"], "x.txt: no such file"),
    (["--prompt-file=x.doc", "--t5={f}/t5"], "expected .txt, .csv or .tsv"),
    (["--classes=1"], "draws texts: give --prompts"),
    (["--prompts", "a", "--classes=1"], "expected one of --classes"),
    (["--prompts", "a", "--t5={f}/gpt"], "feed_forward_proj"),
  ],
)
def test_bad_commands(run, capsys, flags, words):
  flags = [flag.format(f=run[0]) for flag in flags]
  code, err = llamagen(capsys, run[0], [*flags, f"--out={run[0]}/x.png"])
  assert code == 2
  assert words in err[0]
