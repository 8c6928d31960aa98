"""`llamagen sample`: mistakes end in one line, before any model is read."""

import dataclasses

import jax
import numpy as np
import pytest

from llamagen_jax import SamplingConfig, UserError
from llamagen_jax.commands import cli
from llamagen_jax.sampling.sample import restrict_to_codebook, sample
from llamagen_jax.sampling.timings import Timings, covered
from tests.sampling import fid_batch_test

saved = fid_batch_test.saved


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--seed=-1"], "--seed=-1: expected 0 .. 2^64 - 1"),
    ([f"--seed={10**20}"], "expected 0 .. 2^64 - 1"),
    (["--top-k=3000000000"], "top_k=3000000000: expected 0 .. 2147483647"),
    (["--temperature=nan"], "temperature=nan: expected a number > 0"),
    (["--guidance-scale=inf"], "guidance_scale=inf: expected a number >= 1"),
    (["--guidance-beta=2"], "guidance_beta=2.0: expected in (0, 1]"),
    (["--window=0"], "window=0: expected 1 or more"),
    (["--order=snake"], "--order: invalid choice: 'snake'"),
    (["--kv-cache=fp8"], "--kv-cache: invalid choice: 'fp8'"),
    (["--fid-batch=4", "--out=samples_cfg1.5"], "ends in .npz"),
    (["--fid-batch=4", "--count=2", "--out=x.npz"], "it takes no --count"),
    (["--out=x.jpg"], "ends in .png or .npz, or a folder"),
    (["--out=x.PNG"], "ends in .png or .npz, or a folder"),
    (["--out=folder.png"], "folder.png: is a folder, expected a file"),
  ],
)
def test_mistakes_are_told_before_the_work(flags, words, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder.png").mkdir()
  argv = ["sample", f"--gpt={tmp_path / 'none'}", f"--tokenizer={tmp_path / 'none'}"]
  if not any(flag.startswith("--out") for flag in flags):
    argv.append("--out=x.png")
  if not any(flag.startswith("--fid-batch") for flag in flags):
    argv.append("--classes=1")
  assert cli.run([*argv, *flags]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1


def test_images_are_never_distorted(saved, capsys):
  argv = ["sample", f"--gpt={saved / 'gpt'}", f"--tokenizer={saved / 'vq'}"]
  assert cli.run([*argv, "--classes=1", "--out=x.png", "--image-size=8x6"]) == 2
  expected = "image size 8x6: expected the shape of the model's images, 6x6\n"
  assert capsys.readouterr().err.endswith(expected)


def test_a_bundle_of_raster_order_has_no_other(saved, capsys):
  argv = ["sample", f"--gpt={saved / 'gpt'}", f"--tokenizer={saved / 'vq'}"]
  assert cli.run([*argv, "--classes=1", "--out=x.png", "--order=random"]) == 2
  expected = (
    "order=random: the model learned raster order only; expected --order=raster"
  )
  assert capsys.readouterr().err.endswith(f"{expected}\n")


@pytest.mark.parametrize("flag", ["--weights=int8", "--kv-cache=int8"])
def test_a_folder_may_have_a_dot_and_windows_and_int8_are_flags(
  saved, tmp_path, capsys, flag
):
  out = tmp_path / "samples_cfg1.5"
  argv = [
    "sample", f"--gpt={saved / 'gpt'}", f"--tokenizer={saved / 'vq'}", f"--out={out}",
    "--classes=0-3", "--window=4", flag,
  ]  # fmt: skip
  assert cli.run(argv) == 0
  assert len(list(out.glob("*.png"))) == 4
  words = capsys.readouterr().out.split()
  forwards = float(words[words.index("forwards") - 1])
  assert 9 / 4 <= forwards <= 9


def test_codes_beyond_the_codebook_are_never_sampled(saved):
  gpt, tokenizer = fid_batch_test.load(saved, None)
  size, large = tokenizer.config.codebook_size, 40
  rng = np.random.default_rng(0)
  wide = dataclasses.replace(
    gpt,
    config=dataclasses.replace(gpt.config, vocab_size=large),
    params=gpt.params
    | {
      "head": np.concatenate(
        [gpt.params["head"], 50 + rng.random((gpt.config.dim, large - size))], axis=1
      ).astype(np.float32),
      "code_embedding": rng.random((large, gpt.config.dim)).astype(np.float32),
    },
  )
  narrow = restrict_to_codebook(wide, tokenizer)
  assert narrow.config.vocab_size == size
  assert restrict_to_codebook(gpt, tokenizer) is gpt
  images = sample(wide, tokenizer, [0, 1], seed=2)  # a code beyond decodes to NaN
  assert images.std() > 0


def test_seeds_that_differ_in_the_high_bits_give_other_images(saved):
  gpt, tokenizer = fid_batch_test.load(saved, None)
  one, other = (sample(gpt, tokenizer, [0], seed=seed) for seed in (3, 3 + 2**32))
  assert (one != other).any()


def test_another_seed_compiles_nothing(saved):
  gpt, tokenizer = fid_batch_test.load(saved, None)
  sample(gpt, tokenizer, [0], seed=1)
  compiled = []

  def listen(event: str, seconds: float, **_):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    sample(gpt, tokenizer, [0], seed=2)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert [event for event in compiled if "backend_compile" in event] == []


def test_nested_traces_count_once():
  assert covered([(0.0, 3.0), (1.0, 2.0), (2.5, 4.0), (6.0, 7.0)]) == 5.0
  assert covered([]) == 0.0


def test_the_settings_of_a_bundle_may_be_of_guidance_free_models_only(saved):
  gpt, tokenizer = fid_batch_test.load(saved, None)
  free = dataclasses.replace(gpt, sampling=SamplingConfig(guidance_beta=0.5))
  with pytest.raises(UserError, match="guidance_beta=0.5"):
    sample(free, tokenizer, [0])
  assert "forwards" in str(Timings(forwards=[4, 5]))
