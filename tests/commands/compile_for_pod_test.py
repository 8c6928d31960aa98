"""The verb, on a model that compiles in seconds."""

import dataclasses
import json

import jax
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.configs.c2i_imagenet import get_config
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import products, train_flops
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.pod.train_step import compile_train_step
from llamagen_jax.text.t5 import T5Config
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.recipe import build
from llamagen_jax.weights.t5 import FIELDS
from tests import tiny

CONFIG = "configs/c2i_imagenet.py:runlocal"


def compile_for_pod(*flags: str) -> int:
  command = ["compile-for-pod", f"--config={CONFIG}", "--config.data.batch_size=16"]
  return cli.run([*command, *flags])


def sizes_of(config: GPTConfig) -> dict[str, int]:
  params = jax.eval_shape(lambda: unbox(init_gpt(config, jax.random.key(0))))
  return {
    jax.tree_util.keystr(path): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def test_model_flops_count_the_matrices_of_the_model():
  sizes = sizes_of(tiny.GPT)
  used = [n for name, n in sizes.items() if "norm" not in name and "embedd" not in name]
  condition = sum(n for name, n in sizes.items() if "condition" in name)
  assert products(tiny.GPT) == (sum(used) - condition) * tiny.GPT.image_tokens
  assert train_flops(tiny.GPT, 6) == 3 * train_flops(tiny.GPT, 2)

  caption = {"condition": "caption", "caption_tokens": 5, "caption_dim": 12}
  c = dataclasses.replace(tiny.GPT, **caption)
  sizes = sizes_of(c)
  layers = sum(n for x, n in sizes.items() if "layers" in x and "norm" not in x)
  perceptron = sizes["['condition']['in']"] + sizes["['condition']['out']"]
  expected = layers * (5 + 8) + sizes["['head']"] * 9 + perceptron * 5
  assert products(c) == expected


@pytest.mark.extra
@pytest.mark.parametrize("mesh", ["data=-1", "fsdp=-1", "tensor=-1"])
def test_a_small_config_compiles_for_four_chips(mesh, tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  axis, size = mesh.split("=")
  flags = [f"--config.mesh.{axis}={size}", f"--json={tmp_path}/figures.json", "--quick"]
  if axis != "data":
    flags.append("--config.mesh.data=1")
  assert compile_for_pod("--topology=v5e:2x2", *flags) == 0
  printed = capsys.readouterr().out
  assert "4 x v5e" in printed and "fits, scratch memory of kernels" in printed
  found = json.loads((tmp_path / "figures.json").read_text())
  assert found["fits"] and found["chips"] == 4
  # 1.0 but for what every chip repeats of the small matrices that do not divide.
  assert 0.95 < found["flops"] / found["model_flops"] < 1.2
  kinds = {c["kind"] for c in found["collectives"]}
  assert "all-reduce" in kinds or "reduce-scatter" in kinds
  if axis == "data":
    assert "all-to-all" not in kinds


@pytest.mark.extra
def test_machine_code_adds_scratch_memory_and_nothing_else(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  found = []
  for flag in (["--quick"], []):
    json_flag = f"--json={tmp_path}/figures.json"
    assert compile_for_pod("--topology=v5e:2x2", json_flag, *flag) == 0
    found.append(json.loads((tmp_path / "figures.json").read_text()))
  quick, whole = found
  err = capsys.readouterr().err
  assert "making machine code" in err and "tracing the train step" in err
  assert (quick.pop("machine_code"), whole.pop("machine_code")) == (False, True)
  planned, taken = quick.pop("memory"), whole.pop("memory")
  assert planned["arguments"] == taken["arguments"]
  # The plan rounds every output up to a block of 512 bytes.
  assert abs(planned["outputs"] - taken["outputs"]) < 8192
  assert 0 < planned["temporaries"] <= taken["temporaries"]
  assert planned["code"] == 0 < taken["code"]
  assert quick.pop("hbm") < whole.pop("hbm")
  assert quick == whole
  assert whole["topology"] == "v5e:2x2" and whole["libtpu"]


@pytest.mark.extra
def test_two_slices(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  flags = ["--config.mesh.fsdp=4", f"--json={tmp_path}/figures.json", "--quick"]
  assert compile_for_pod("--topology=v5e:2x2x2", *flags) == 0
  printed = capsys.readouterr().out
  assert "8 x v5e in 2 slices" in printed and "among 2 slices" in printed
  found = json.loads((tmp_path / "figures.json").read_text())
  assert (found["slices"], found["chips"]) == (2, 8)
  between = [c for c in found["collectives"] if c["network"] == "DCN"]
  sent = sum(c["sent"] for c in between)
  assert found["seconds"]["DCN"] == pytest.approx(sent / 3.125e9)
  # Gradients in float32, each chip its quarter; what is not sharded over fsdp, whole.
  parameters = sum(sizes_of(build(GPTRecipe, get_config("runlocal")).model).values())
  assert 4 * parameters / 4 <= sent < 1.2 * 4 * parameters


@pytest.mark.extra
@pytest.mark.parametrize("mesh", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"])
def test_captions_compile_with_features_and_with_a_t5_along(mesh, tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  t5 = T5Config(512, dim=256, layers=3, heads=4, head_dim=64, ffn_dim=512)
  fields = {theirs: getattr(t5, ours) for theirs, ours in FIELDS.items()}
  fields["feed_forward_proj"] = "gated-gelu"
  (tmp_path / "config.json").write_text(json.dumps(fields))
  command = (
    "compile-for-pod --config=configs/t2i_laion.py:stage2,runlocal --topology=v5e:2x2"
    f" --config.data.batch_size=16 --config.model.caption_dim=256 {mesh} --quick"
    f" --json={tmp_path}/figures.json"
  ).split()
  found = []
  for flags in ([], [f"--config.data.t5={tmp_path}"]):
    assert cli.run([*command, *flags]) == 0
    found.append(json.loads((tmp_path / "figures.json").read_text()))
  printed = capsys.readouterr().out
  assert printed.count("T5 before it") == 1
  stored, along = found
  assert stored["fits"] and stored["before"] is None
  assert 0.95 < stored["flops"] / stored["model_flops"] < 1.2
  encoder = along.pop("before")
  assert 0.95 < encoder["flops"] / encoder["model_flops"] < 1.2
  # Half of the matrices on every chip, in bfloat16, beside what was there before.
  matrices = 3 * (4 * 256 * 256 + 3 * 256 * 512) + 512 * 256
  weights = encoder["memory"]["arguments"]
  assert 0.5 * 2 * matrices < weights < 0.6 * 2 * matrices
  assert along["hbm"] >= stored["hbm"] + weights
  assert along["least_seconds"] > stored["least_seconds"]
  for name in ("flops", "bytes", "memory", "collectives"):
    assert along[name] == stored[name]


@pytest.mark.extra
@pytest.mark.parametrize(
  "arg, step, phase, steps",
  [
    ("c2i_imagenet.py:runlocal,recipe=npp", 0, "patches of 2x2 codes", 10),
    ("c2i_imagenet.py:runlocal,recipe=rar", 14, "random orders", 15),
    ("c2i_imagenet.py:runlocal,recipe=gft", None, None, 20),
    ("finetune.py:runlocal,align", None, None, 20),
  ],
)
def test_the_step_of_each_successor(arg, step, phase, steps, tmp_path, capsys):
  """Compiles what the phase of the step trains by, and counts the phase's steps."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  command = ["compile-for-pod", f"--config=configs/{arg}", "--topology=v5e:2x2"]
  command += ["--quick", "--config.data.batch_size=16"]
  command += [f"--json={tmp_path}/figures.json"]
  assert cli.run([*command, *([] if step is None else [f"--step={step}"])]) == 0
  printed = capsys.readouterr().out
  assert ("phase   " in printed) == (phase is not None)
  assert phase is None or phase in printed
  found = json.loads((tmp_path / "figures.json").read_text())
  assert found["steps"] == steps
  assert 0.95 < found["flops"] / found["model_flops"] < 1.2


def test_a_step_beyond_the_run():
  recipe = build(GPTRecipe, get_config("runlocal"))
  with pytest.raises(UserError, match="--step=20: expected a step below run.steps=20"):
    compile_train_step(recipe, "v5e:2x2", step_number=20)


@pytest.mark.extra
@pytest.mark.parametrize("mesh", ["data=4", "tensor=2"])
def test_the_kernel_of_attention_compiles(mesh, tmp_path, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  flags = ["--config.model.attention=splash", "--config.model.dtype=bfloat16"]
  flags += [f"--config.mesh.{mesh}", f"--json={tmp_path}/figures.json", "--quick"]
  assert compile_for_pod("--topology=v5e:2x2", *flags) == 0
  assert "runs of kernels not counted" in capsys.readouterr().out
  found = json.loads((tmp_path / "figures.json").read_text())
  assert found["silent_kernels"] == 4 * 3  # layers; forward and two backward


@pytest.mark.extra
@pytest.mark.slow
def test_what_chips_exchange_when_they_share_the_weights(tmp_path):
  """Weights come a matrix at a time; rows change place in look-ups and nowhere else."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  config = GPTConfig.preset("B", image_size=256)
  command = (
    "compile-for-pod --config=configs/c2i_imagenet.py:B --config.model.layers=4"
    " --config.data.batch_size=16 --config.mesh.data=1 --config.mesh.fsdp=-1"
    f" --topology=v5e:2x2 --json={tmp_path}/figures.json --quick"
  )
  assert cli.run(command.split()) == 0
  found = json.loads((tmp_path / "figures.json").read_text())
  kinds = {c["kind"]: c for c in found["collectives"]}
  assert set(kinds) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
  table = config.vocab_size * config.dim
  assert kinds["all-gather"]["largest"] <= 2 * table  # the head in bfloat16
  assert kinds["reduce-scatter"]["largest"] <= 4 * table  # its float32 gradient
  # Tables are sharded over D and activations over B: codes forward in bfloat16,
  # gradients of codes and labels back in float32.
  rows = 16 // 4 * config.dim
  assert kinds["all-to-all"]["size"] <= rows * (6 * config.length + 4)


@pytest.mark.extra
@pytest.mark.slow
def test_logits_take_one_float32_array(tmp_path):
  """Forward, and their gradient in its place: what a loss in chunks could save."""
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  used = []
  for vocabulary in (16384, 8192):
    command = (
      "compile-for-pod --config=configs/c2i_imagenet.py:B --config.model.layers=2"
      f" --config.model.vocab_size={vocabulary} --config.data.batch_size=64"
      f" --topology=v5e:2x2 --json={tmp_path}/figures.json --quick"
    )
    assert cli.run(command.split()) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    used.append(found["memory"]["temporaries"])
  array = 64 // 4 * 256 * 8192 * 4
  gradients = 2 * 768 * 8192 * 4  # of the embedding and the head, whole on every chip
  taken = (used[0] - used[1] - gradients) / array
  print(f"logits take {taken:.2f} of a float32 array")
  assert taken <= 1.05


@pytest.mark.extra
@pytest.mark.slow
@pytest.mark.parametrize("remat, limit", [("none", 1.05), ("full", 1.40)])
def test_flops_against_the_models(remat, limit, tmp_path):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  command = (
    "compile-for-pod --config=configs/c2i_imagenet.py:B --config.model.layers=4"
    f" --config.data.batch_size=16 --config.model.remat={remat}"
    f" --topology=v5e:2x2 --json={tmp_path}/figures.json --quick"
  )
  assert cli.run(command.split()) == 0
  found = json.loads((tmp_path / "figures.json").read_text())
  assert 1.0 <= found["flops"] / found["model_flops"] <= limit


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--topology=v9:2x2"], "topology 'v9:2x2': expected such as v5e:2x4"),
    (["--topology=v5p:2x2"], "v5p has 3 axes"),
    ([], "--topology is required"),
    (["--topology=v5e:2x2", "--config.model.dimm=3"], "mean --config.model.dim?"),
    (["--topology=v5e:2x2", "--t5=giant"], "invalid choice: 'giant' (choose from"),
  ],
)
def test_bad_commands(flags, words, capsys):
  assert compile_for_pod(*flags) == 2
  assert words in capsys.readouterr().err


def test_a_folder_of_no_t5(capsys):
  command = "compile-for-pod --config=configs/t2i_laion.py:runlocal --topology=v5e:2x2"
  assert cli.run([*command.split(), "--config.data.t5=nowhere"]) == 2
  assert "nowhere: no config.json" in capsys.readouterr().err


@pytest.mark.extra
@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.mesh.data=8"], "holds 8 devices, but 4 are here"),
    (["--config.data.batch_size=6"], "data.batch_size=6 is not a multiple"),
    (["--t5=small"], "expected model.condition=caption and model.caption_dim=512"),
  ],
)
def test_configs_that_do_not_go_on_the_topology(flags, words, capsys):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  assert compile_for_pod("--topology=v5e:2x2", *flags) == 2
  assert words in capsys.readouterr().err
