"""`--search`: which configs are tried, and in which order they are printed."""

import io
import json

import pytest

from llamagen_jax import UserError
from llamagen_jax.commands import cli
from llamagen_jax.parallel.chips import CHIPS
from llamagen_jax.pod.hlo import Analysis, Memory
from llamagen_jax.pod.report import CompileReport
from llamagen_jax.pod.search import search
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build
from tests import tiny

CHIP = CHIPS["TPU v5 lite"]


@pytest.fixture
def recipe(tmp_path):
  config = tiny.gpt_config(tmp_path, 10)
  config.data.batch_size = 16
  return build(GPTRecipe, config)


def report(gib, flops):
  memory = Memory(arguments=gib << 30, outputs=0, temporaries=0, code=0)
  return CompileReport(CHIP, 8, 1, 1e12, Analysis(memory, flops, 1.0, (), ()))


def test_the_cheapest_mesh_then_recomputation_then_batch(recipe):
  seen = []

  def compile_one(r):
    seen.append((r.mesh.fsdp, r.mesh.tensor, r.model.remat, r.data.batch_size))
    cost = {"none": 2.0, "dots": 1.0, "full": 3.0}[r.model.remat]
    spread = 1.0 if (r.mesh.fsdp, r.mesh.tensor) == (2, 2) else 1.5
    # A larger batch is cheaper an image, and the largest does not fit.
    batch = r.data.batch_size
    return report(20 if batch > 32 else 3, cost * spread * batch**0.9 * 1e12)

  trials = search(recipe, 8, compile_one, io.StringIO())
  best = trials[0].recipe
  assert (best.mesh.data, best.mesh.fsdp, best.mesh.tensor) == (2, 2, 2)
  assert (best.model.remat, best.data.batch_size) == ("dots", 32)
  assert len(seen) == len(set(seen)) == len(trials)
  assert "over by 4.0 GiB" in trials[-1].line()
  costs = [trial.chip_seconds for trial in trials]
  assert costs == sorted(costs)
  for trial in trials:
    m = trial.recipe.mesh
    assert m.data * m.fsdp * m.tensor == 8


def test_what_fits_nowhere_is_tried_with_full_recomputation(recipe):
  def compile_one(r):
    return report(10 if r.model.remat == "full" else 30, 1e12)

  trials = search(recipe, 8, compile_one, io.StringIO())
  assert trials[0].recipe.model.remat == "full"


def test_what_the_compiler_refuses_comes_last(recipe):
  def compile_one(r):
    if r.mesh.tensor > 1:
      raise UserError("the compiler refuses: no room")
    return report(3, 1e12)

  trials = search(recipe, 8, compile_one, io.StringIO())
  assert "no room" in trials[-1].line()
  assert "no room" not in trials[0].line()


@pytest.mark.extra
def test_the_verb(tmp_path, capfd):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  command = (
    "compile-for-pod --config=configs/c2i_imagenet.py:runlocal --topology=v5e:1x1"
    f" --config.data.batch_size=4 --search --quick --json={tmp_path}/found.json"
  )
  assert cli.run(command.split()) == 0
  found = json.loads((tmp_path / "found.json").read_text())
  assert {t["remat"] for t in found} == {"none", "dots", "full"}
  assert {t["batch_size"] for t in found} == {4, 8, 16}
  assert len(capfd.readouterr().out.splitlines()) == len(found) + 1


def test_a_batch_that_no_mesh_divides(recipe):
  with pytest.raises(UserError, match="batch_size=16: no mesh of 256 chips .* of 32"):
    search(recipe, 256, lambda r: report(1, 1.0), io.StringIO())
