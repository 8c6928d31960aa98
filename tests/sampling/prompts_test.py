"""Prompts: files, features, negative prompts, and the folder that is written."""

import dataclasses
import json

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


def test_the_settings_beside_an_npz_have_the_prompts(run, tmp_path, capsys):
  out = tmp_path / "x.npz"
  flags = [f"--t5={run[0]}/t5", f"--out={out}", "--negative-prompt=a small book"]
  code, err = llamagen(capsys, run[0], [*flags, "--prompts", "a cat", "two birds"])
  assert code == 0, err
  settings = json.loads(out.with_suffix(".json").read_text())
  assert settings["prompts"] == ["a cat", "two birds"]
  assert settings["negative_prompt"] == "a small book"


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


def test_a_folder_is_sampled_into_again(run, tmp_path, capsys):
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
    (["--classes=1"], "is a model of texts: give --prompts"),
    (["--prompts", "a", "--classes=1"], "expected one of --classes"),
    (["--prompts", "a", "--t5={f}/gpt"], "feed_forward_proj"),
  ],
)
def test_bad_commands(run, capsys, flags, words):
  flags = [flag.format(f=run[0]) for flag in flags]
  code, err = llamagen(capsys, run[0], [*flags, f"--out={run[0]}/x.png"])
  assert code == 2
  assert words in err[0]


@pytest.mark.parametrize(
  "name, content, expected",
  [
    ("a.txt", "\ufeffa\u2028cat\r\n\r\na\x0bdog\ra\x85fox\n".encode(),
     ["a\u2028cat", "a\x0bdog", "a\x85fox"]),
    ("a.csv", "\ufeffprompt,n\r\na cat,1\r\n".encode(), ["a cat"]),
    ("a.csv", b'n,Caption\n1,"a ""red"" cat,\nup"\n2\n', ['a "red" cat,\nup']),
    ("a.tsv", b'prompt\tn\n"an unclosed one\t1\na "b" c\t2\n"d ""e"""\t3\n\t4\n',
     ['"an unclosed one', 'a "b" c', 'd "e"']),
    ("A.TXT", b"a cat", ["a cat"]),
  ],
)  # fmt: skip
def test_lines_end_at_newlines_only(tmp_path, name, content, expected):
  (tmp_path / name).write_bytes(content)
  assert read_prompts(f"{tmp_path}/{name}") == expected


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("a.txt", "a café".encode("latin-1"), "byte 5 is 0xe9, expected text in UTF-8"),
    ("a.txt", "\ufeffa café".encode() + b"\xff", "byte 10 is 0xff"),
    ("a.txt", "a cat".encode("utf-16"), "byte 0 is 0xff.*found UTF-16"),
    ("a.txt", "a cat".encode("utf-16-le"), "byte 1 is 0x00"),
    ("a.csv", "prompt\na café".encode("latin-1"), "byte 12 is 0xe9"),
    ("a.csv", b"prompt\n" + b"a" * 140_000, "line 2: field larger than field limit"),
    ("a.csv", b'prompt,n\n"an unclosed one,1\na,2\n', "line 3: unexpected end of data"),
    ("a.csv", b"", "no column prompt"),
    ("a.tsv", b"prompt\n\n \n", "no prompts in it"),
  ],
)
def test_what_is_no_text_is_named_with_its_place(tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=f"{name}.*{words}"):
    read_prompts(f"{tmp_path}/{name}")


def test_prompts_that_cleaning_empties_are_said(run, caplog):
  _, gpt, encoder = run
  prompts = Prompts.of(gpt, encoder, ["a cat", "山水", "a cat"])
  _, mask = prompts.take(np.arange(3))
  assert mask.any(axis=1).tolist() == [True, False, True]
  assert caplog.text.count("nothing is left of it") == 1 and "'山水'" in caplog.text
  with pytest.raises(UserError, match="prompt .*: not UTF-8"):
    Prompts.of(gpt, encoder, ["a \ud83d"])


@pytest.mark.extra
def test_files_in_a_bucket(bucket):
  (bucket / "a.csv").write_text("prompt\na cat\n")
  assert read_prompts(f"{bucket}/a.csv:prompt") == ["a cat"]
