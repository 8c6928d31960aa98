"""The slot engine, compiled for chips that are not here."""

import dataclasses
import io
import json
import re

import pytest

from llamagen_jax.commands import cli
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.pod import hlo
from llamagen_jax.pod.engine import compile_engine
from llamagen_jax.pod.process import run_apart
from llamagen_jax.pod.report import CompileReport, as_text

pytestmark = pytest.mark.extra

CONFIG = "configs/c2i_imagenet.py:runlocal"


@pytest.mark.slow
@pytest.mark.parametrize("preset, where, tensor, most", [
  ("XL", "v5e:1x1", 1, 1.25), ("3B", "v5e:2x2", 4, 1.6),
])  # fmt: skip
def test_a_chunk_reads_weights_and_cache_once_a_step(
  preset, where, tensor, most, capsys
):
  """Of the cache what is written, in whole blocks; with the heads of 3B, all of it."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = GPTConfig.preset(preset, image_size=384, dtype="bfloat16")
  report = compile_engine(config, slots=32, steps=8, tensor=tensor, where=where)
  with capsys.disabled():
    print(f"\n{preset} at 384, 32 slots on {where}", as_text(report.rows()), sep="\n")
  found, more = report.analysis, report.more_figures
  assert report.fits
  assert found.memory.temporaries < 0.05 * found.memory.arguments
  assert 1 < found.bytes / more["least_bytes"] < most
  largest = max((copy.size for copy in found.copies), default=0)
  assert largest < 2e6  # a cache has 94 MB or 59 MB
  assert 0 < more["images_per_second"] < more["bound"]


@pytest.mark.parametrize("condition, where", [
  ("class", "v5e:1x1"), ("caption", "v6e:1x1"),
])  # fmt: skip
def test_a_cache_of_8_bits_is_read_as_it_is(condition, where):
  """What is written, once a step; keys in floating point would be temporaries."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = dataclasses.replace(
    GPTConfig.preset("XL", image_size=384, dtype="bfloat16", kv_cache="int8"),
    layers=2, vocab_size=512, condition=condition,
  )  # fmt: skip
  shape, rows = (32, 8, 1), 64
  report = run_apart(compile_engine, config, *shape, where, True, news=io.StringIO())
  found, more = report.analysis, report.more_figures
  assert 1 < found.bytes / more["least_bytes"] < 1.4
  assert found.silent_kernels == 0
  # One layer's keys or values of the condition go to fast memory and back.
  tokens = 0.5 * config.image_tokens + config.prefix_tokens
  assert found.memory.temporaries < tokens * rows * config.dim * 2


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_each_layer_runs_the_kernel_and_copies_no_cache(cache, tensor, monkeypatch):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = GPTConfig(
    2, 4, 128, grid=16, vocab_size=512, dtype="bfloat16", kv_cache=cache
  )
  report, text = compiled(config, tensor, monkeypatch)
  kernels = re.findall(r"%attend_ragged\S* = .*tpu_custom_call", text)
  assert len(kernels) == config.layers and report.analysis.silent_kernels == 0
  keys = 8 * config.dim // tensor * config.image_tokens * (2 if cache == "float" else 1)
  assert max((copy.size for copy in report.analysis.copies), default=0) < keys / 4


def test_heads_that_do_not_fit_the_tiles_are_left_to_xla(monkeypatch):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = GPTConfig(1, 2, 200, grid=8, vocab_size=512, dtype="bfloat16")
  assert "attend_ragged" not in compiled(config, 1, monkeypatch)[1]


def compiled(config: GPTConfig, tensor: int, monkeypatch) -> tuple[CompileReport, str]:
  """Returns the report and the program of a chunk on four chips, 4 slots a group."""
  texts, analyse = [], hlo.analyse_text

  def keep(text, *rest):
    texts.append(text)
    return analyse(text, *rest)

  monkeypatch.setattr(hlo, "analyse_text", keep)
  report = compile_engine(config, slots=4, steps=4, tensor=tensor, where="v5e:2x2")
  return report, texts[0]


@pytest.mark.parametrize("condition", ["class", "caption"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_what_four_chips_exchange(condition, tensor):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = dataclasses.replace(
    GPTConfig(2, 4, 128, grid=8, vocab_size=512), condition=condition, dtype="bfloat16"
  )
  report = compile_engine(config, slots=4, steps=4, tensor=tensor, where="v5e:2x2")
  sent = {c.kind: c.largest for c in report.analysis.collectives}
  assert "all-to-all" not in sent
  # The codes go to all chips, once a chunk: int32, two rows a slot, of a whole image.
  # Chips that share a model add up the residual stream.
  codes = report.more_figures["slots"] * 2 * config.image_tokens * 4
  residual = 2 * 4 * 128 * 4
  assert sent.pop("all-gather", 0) <= codes
  assert all(largest <= (residual if tensor > 1 else 1024) for largest in sent.values())


def test_the_verb(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  flags = ["--topology=v5e:2x2", "--program=engine", "--batch-size=4", "--chunk=2",
           "--kv-cache=int8", "--window=3"]  # fmt: skip
  command = ["compile-for-pod", f"--config={CONFIG}", *flags]
  assert cli.run([*command, f"--json={tmp_path}/figures.json"]) == 0
  said = capsys.readouterr().out
  assert "of the arguments" in said and "without a right guess" in said
  found = json.loads((tmp_path / "figures.json").read_text())
  assert found["fits"] and found["slots"] == 16
  assert (found["steps"], found["window"]) == (2, 3)
