"""Decoding, compiled for chips that are not here."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.pod import topology
from llamagen_jax.pod.compiler import analysed
from llamagen_jax.pod.sampler import abstract_params
from llamagen_jax.sampling.decode import DecodeInputs, DecodeState, decode_segment

pytestmark = pytest.mark.extra

CONFIG = "configs/c2i_imagenet.py:runlocal"


def size(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_decode_step_reads_weights_and_cache_once(capsys):
  """XL at 384, 32 images with guidance: the last segment, over the whole cache."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  c = GPTConfig.preset("XL", image_size=384, dtype="bfloat16")
  sampling, images, steps = SamplingConfig(guidance_scale=1.75), 32, 72
  mesh = topology.mesh("v5e:1x1")
  whole = jax.NamedSharding(mesh, jax.P())

  def abstract(make):
    tree = jax.eval_shape(make)
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree
    )

  with jax.set_mesh(mesh):
    params = abstract_params(c, mesh)
    cache = abstract(lambda: init_cache(c, 2 * images, c.length))
    keys = abstract(lambda: jax.random.split(jax.random.key(0), images))
    codes = abstract(lambda: jnp.zeros(images, jnp.int32))
    settings = abstract(lambda: sampling.for_batch(images))
    start = c.image_tokens - steps

    @functools.partial(jax.jit, donate_argnums=2)
    def segment(params, codes, cache, keys, settings):
      inputs = DecodeInputs(params, keys, None, settings)
      state = DecodeState(codes, jnp.int32(start), cache)
      return decode_segment(c, sampling.active_filters, inputs, state, steps)

    found = analysed(segment.lower(params, codes, cache, keys, settings))
  m = found.memory
  once = size(params) - size(params["code_embedding"]) + size(cache)
  ratio = found.bytes / steps / once
  largest = max((copy.size for copy in found.copies), default=0)
  with capsys.disabled():
    print(
      f"\nXL-384, 64 rows, v5e: temporaries {m.temporaries / m.arguments:.2%} of"
      f" arguments, {found.bytes / steps / 1e9:.2f} GB a step = {ratio:.3f} x weights"
      f" and cache, the largest copy {largest} bytes"
    )
  assert m.total < 16 * 2**30
  assert m.temporaries < 0.05 * m.arguments
  assert 0.95 < ratio < 1.3
  assert largest < 0.01 * size(cache[0].keys)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_sampler_compiles_for_four_chips(tensor, tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  flags = ["--topology=v5e:2x2", "--program=sampler", "--batch-size=4"]
  command = ["compile-for-pod", f"--config={CONFIG}", *flags, f"--tensor={tensor}"]
  assert cli.run([*command, f"--json={tmp_path}/figures.json"]) == 0
  assert "images/s a chip" in capsys.readouterr().out
  found = json.loads((tmp_path / "figures.json").read_text())
  assert found["fits"] and found["images"] == 4 * 4 // tensor
  # Caches are longer than what is written, a condition's logits those of one token.
  assert 0.9 < found["flops"] / found["model_flops"] < 1.1
  sent = {c["kind"]: c for c in found["collectives"]}
  if tensor == 1:
    assert not sent
  else:
    assert "all-reduce" in sent and "all-to-all" not in sent
    tokens = math.prod((4 * 2, 128, 4))  # the residual stream of a data slot
    assert all(c["largest"] <= 16 * tokens for c in sent.values())


def test_a_mesh_that_does_not_divide_the_chips_is_refused(capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  flags = ["--topology=v5e:2x2", "--program=sampler", "--tensor=3"]
  assert cli.run(["compile-for-pod", f"--config={CONFIG}", *flags]) == 2
  assert "tensor" in capsys.readouterr().err
