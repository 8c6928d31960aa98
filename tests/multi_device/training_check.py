"""Training on eight fake devices equals training on one."""

import numpy as np
import pytest

from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.training import loop
from llamagen_jax.training import train_gpt as gpt_train
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.training.recipe import build
from tests import tiny
from tests.multi_device.sampling_check import one_device

MESHES = {
  "data": {"data": 8, "fsdp": 1, "tensor": 1},
  "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
  "tensor": {"data": 2, "fsdp": 1, "tensor": 4},
  "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def losses(module, config, workdir, mesh):
  config.unlock()
  config.mesh = mesh
  module.train(config, workdir)
  rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
  assert len(rows) == 5
  return [(row["loss"], row.get("discriminator_loss", 0.0)) for row in rows]


def losses_on_one_device(module, config, workdir):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda **sizes: one_device())
    return losses(module, config, workdir, {"data": 1})


@pytest.fixture(scope="module")
def expected(codes, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  return losses_on_one_device(gpt_train, tiny.gpt_config(codes, 5), workdir)


@pytest.mark.parametrize("mesh", MESHES)
def test_transformer(codes, expected, tmp_path, mesh):
  found = losses(gpt_train, tiny.gpt_config(codes, 5), tmp_path, MESHES[mesh])
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_state_is_sharded_by_the_table(codes):
  recipe = loop_recipe(codes)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  task = gpt_train.make_task(recipe)
  state = loop.abstract_state(task.init, mesh)

  def placed(leaf):
    return tuple(leaf.sharding.spec)

  for tree in (state.params, state.ema, *state.opt_state.inner[1][1:]):
    assert placed(tree["code_embedding"]) == ("tensor", "fsdp")
    assert placed(tree["layers"]["attention"]["qkv"])[1:3] == ("fsdp", "tensor")
    assert placed(tree["layers"]["ffn"]["out"])[1:] == ("tensor", "fsdp")


def loop_recipe(codes):
  return build(GPTRecipe, tiny.gpt_config(codes, 1))


def test_an_axis_that_does_not_divide_is_replicated_and_logged(codes, caplog):
  task = gpt_train.make_task(loop_recipe(codes))
  with caplog.at_level("WARNING"):
    state = loop.abstract_state(task.init, make_mesh(data=1, fsdp=1, tensor=8))
  # 4 kv heads do not divide by 8; neither does a vocabulary of 50.
  assert tuple(state.params["layers"]["attention"]["qkv"].sharding.spec) == (None,) * 5
  text = caplog.text
  assert "'kv_heads' (4)" in text
  assert "'vocab' (50)" in text
  assert "tensor has 8 parts" in text
