"""`import-weights` and `export-weights` as a user types them."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import llamagen_jax as lg
from llamagen_jax.commands import cli
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from llamagen_jax.weights.files import read_weights, write_weights
from llamagen_jax.weights.published import PUBLISHED
from tests import parity, tiny
from tests.gpt.tiny_gpt import forward

TINY_GPT = "--num-heads=4 --image-size=8"  # 4x4 codes


def llamagen(capsys, command: str) -> tuple[int, str]:
  capsys.readouterr()
  code = cli.run(command.split())
  captured = capsys.readouterr()
  return code, captured.out + captured.err


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A tokenizer with the 128 codes of the tiny transformers."""
  folder = tmp_path_factory.mktemp("tokenizer")
  config = dataclasses.replace(tiny.TOKENIZER, codebook_size=128)
  bundle.save_tokenizer(
    folder, config, unbox(init_tokenizer(config, jax.random.key(0)))
  )
  return folder


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.extra
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("model", ["gpt_tiny_c2i", "gpt_tiny_gqa", "gpt_tiny_t2i"])
def test_import_export_import_is_the_identity(
  tmp_path, capsys, tokenizer, model, suffix
):
  pytest.importorskip("torch")
  golden, weights = parity.golden(), parity.state_dict(model)
  file, back, out = (tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", tmp_path / "gpt")
  write_weights(file, weights)
  command = (
    f"import-weights --file={file} --tokenizer={tokenizer} --out={out} {TINY_GPT}"
  )
  code, text = llamagen(capsys, command)
  assert code == 0, text
  assert "8x8 images" in text

  gpt = lg.load_gpt(out)
  inputs = {
    "gpt_tiny_c2i": ("c2i_logits", golden["c2i_labels"]),
    "gpt_tiny_gqa": ("gqa_logits", golden["c2i_labels"]),
    "gpt_tiny_t2i": ("t2i_logits", golden["t2i_caption"], golden["t2i_mask"]),
  }
  expected, *condition = inputs[model]
  logits = forward(gpt.config, gpt.params, golden["c2i_codes"], *condition)
  np.testing.assert_allclose(logits, golden[expected], atol=2e-4)

  code, text = llamagen(capsys, f"export-weights --bundle={out} --out={back}")
  assert code == 0, text
  assert_same(read_weights(back).tensors, weights)
  again = command.replace(str(file), str(back)).replace(str(out), f"{out}2")
  assert llamagen(capsys, again)[0] == 0
  jax.tree.map(np.testing.assert_array_equal, lg.load_gpt(f"{out}2").params, gpt.params)


@pytest.mark.extra
@pytest.mark.slow
def test_a_published_transformer_through_its_file(tmp_path, capsys):
  """GPT-B: all that the file's name tells, and the logits of the original."""
  torch = pytest.importorskip("torch")
  golden = parity.golden()
  weights = parity.state_dict("GPT-B_256_c2i")
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  torch.save({"model": tensors, "args": None}, tmp_path / "c2i_B_256.pt")
  config = lg.TokenizerConfig.preset("VQ-16", width=32)
  vq = bundle.save_tokenizer(
    tmp_path / "vq", config, unbox(init_tokenizer(config, jax.random.key(0)))
  )
  command = (
    f"import-weights --file={tmp_path}/c2i_B_256.pt --tokenizer={tmp_path}/vq"
    f" --out={tmp_path}/gpt"
  )
  code, text = llamagen(capsys, command)
  assert code == 0, text
  gpt = lg.load_gpt(tmp_path / "gpt")
  assert gpt.config == lg.GPTConfig.preset("B", image_size=256)
  assert gpt.sampling == lg.SamplingConfig(guidance_scale=2.0)
  assert gpt.tokenizer == vq
  assert (len(gpt.class_names), gpt.class_names[207]) == (1000, "golden retriever")
  codes = parity.randint("gptb/codes", 16384, (1, 256))
  labels = parity.randint("gptb/labels", 1000, (1,))
  logits = jax.jit(lg.GPT(gpt.config).apply)({"params": gpt.params}, codes, labels)
  np.testing.assert_allclose(
    logits[:, ::16, ::512], golden["gptb_logits_slice"], atol=2e-4
  )
  back = tmp_path / "back.pt"
  assert (
    llamagen(capsys, f"export-weights --bundle={tmp_path}/gpt --out={back}")[0] == 0
  )
  assert_same(read_weights(back).tensors, weights)


# Not getrusage, whose peak begins with that of the process that started this one.
MEASURED = """
import pathlib, re, sys
from llamagen_jax.commands import cli
from llamagen_jax.gpt.model import init_gpt
assert cli.run(sys.argv[1:]) == 0
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


@pytest.mark.extra
@pytest.mark.slow
def test_a_large_file_is_never_held_whole(tmp_path):
  """GPT-L, 1.4 GB: the whole process, libraries included, within 1.3x the file."""
  torch = pytest.importorskip("torch")
  config = lg.GPTConfig.preset("L", image_size=384)
  shapes = parity.manifest()["state_dicts"]["GPT-B_256_c2i"]
  sizes = {768: config.dim, 2048: config.ffn_dim, 2304: 3 * config.dim}
  block = [name for name in shapes if name.startswith("layers.0.")]
  names = [name for name in shapes if not name.startswith("layers.")] + [
    name.replace("layers.0.", f"layers.{i}.") for i in range(24) for name in block
  ]

  def tensor(name):
    parts = name.split(".")
    like = ".".join(["layers", "0", *parts[2:]]) if parts[0] == "layers" else name
    return torch.rand([sizes.get(size, size) for size in shapes[like]])

  file = tmp_path / "c2i_L_384.pt"
  torch.save({"model": {name: tensor(name) for name in names}}, file)
  vq = lg.TokenizerConfig.preset("VQ-16", width=32)
  bundle.save_tokenizer(
    tmp_path / "vq", vq, unbox(init_tokenizer(vq, jax.random.key(0)))
  )
  done = subprocess.run(
    [
      sys.executable, "-c", MEASURED, "import-weights", f"--file={file}",
      f"--tokenizer={tmp_path}/vq", f"--out={tmp_path}/gpt",
    ],
    env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  ratio = int(done.stdout.split()[-1]) / file.stat().st_size
  print(f"peak memory {ratio:.2f}x the file")
  assert ratio < 1.3


def test_the_list_of_known_checkpoints(capsys):
  code, text = llamagen(capsys, "import-weights --list")
  assert code == 0
  for name, known in PUBLISHED.items():
    row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    assert all(f"{value:g}" in row for value in known.scores.values())
  assert "2.18" in text


@pytest.mark.extra
@pytest.mark.parametrize(
  "flags, words",
  [
    ("", ["--tokenizer is required"]),
    ("--tokenizer={vq}", ["the name of ", "tells nothing", "--image-size"]),
    ("--tokenizer={vq} --image-size=9", ["9 is not a multiple", "downsampling 2"]),
    ("--tokenizer={vq} --image-size=8", ["2 layers of width 64", "num_heads"]),
    ("--tokenizer={vq} --num-heads=4 --model=c2i_L_384", ["c2i_L_384 is a L", "(2, 4"]),
    ("--tokenizer={vq} --model=c2i_X", ["--model=c2i_X", "c2i_3B_384"]),
    ("--tokenizer={vq} {tiny} --top-p=0", ["top_p=0.0"]),
    ("--hub=c2i_B_256", ["one of --file and --hub"]),
    ("--tokenizer={vq} {tiny} --temperature=0", ["temperature=0.0"]),
  ],
)
def test_bad_commands(tmp_path, capsys, tokenizer, flags, words):
  file, out = tmp_path / "x.safetensors", tmp_path / "out"
  write_weights(file, parity.state_dict("gpt_tiny_c2i"))
  flags = flags.format(vq=tokenizer, tiny=TINY_GPT)
  code, text = llamagen(capsys, f"import-weights --file={file} --out={out} {flags}")
  assert code == 2
  assert len(text.strip().splitlines()) == 1
  assert all(word in text for word in words), text
  assert not out.exists()


@pytest.mark.extra
def test_an_entry_without_weights_is_refused(tmp_path, capsys, tokenizer):
  torch = pytest.importorskip("torch")
  weights = parity.state_dict("gpt_tiny_c2i")
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  torch.save({"model": tensors, "ema": {}}, tmp_path / "x.pt")
  command = f"import-weights --file={tmp_path}/x.pt --tokenizer={tokenizer} {TINY_GPT}"
  code, text = llamagen(capsys, f"{command} --out={tmp_path}/out --key=ema")
  assert code == 2 and "no weights under 'ema'" in text and "model (18)" in text
  code, text = llamagen(capsys, f"{command} --out={tmp_path}/out")
  assert code == 0 and "entry 'model'" in text


def test_weights_that_are_not_finite_leave_no_bundle(tmp_path, capsys, tokenizer):
  weights = parity.state_dict("gpt_tiny_c2i")
  weights["layers.1.attention.wo.weight"][3, 4] = np.nan
  file, out = tmp_path / "x.safetensors", tmp_path / "out"
  write_weights(file, weights)
  command = f"import-weights --file={file} --tokenizer={tokenizer} --out={out}"
  code, text = llamagen(capsys, f"{command} {TINY_GPT}")
  assert code == 2 and "layers.1.attention.wo.weight is broken: 1 of its 4096" in text
  assert not out.exists()


def test_tensors_of_no_known_model_are_named(tmp_path, capsys):
  write_weights(tmp_path / "x.safetensors", {"unet.a": np.zeros(2, np.float32)})
  command = f"import-weights --file={tmp_path}/x.safetensors --out={tmp_path}/out"
  code, text = llamagen(capsys, command)
  assert code == 2 and "neither a tokenizer" in text and "unet.a" in text


@pytest.mark.extra
@pytest.mark.parametrize("suffix, grid", [(".pt", 3), (".safetensors", (1, 9))])
def test_every_exported_model_can_be_imported(tmp_path, capsys, suffix, grid):
  """Widths, groups and norms that no published model has, as in the quickstart."""
  pytest.importorskip("torch")
  vq = dataclasses.replace(tiny.TOKENIZER, l2_norm=False, codebook_size=50)
  identity = bundle.save_tokenizer(
    tmp_path / "vq", vq, unbox(init_tokenizer(vq, jax.random.key(0)))
  )
  config = dataclasses.replace(tiny.GPT, grid=grid)
  params = unbox(init_gpt(config, jax.random.key(0)))
  sampling = lg.SamplingConfig(guidance_scale=3.0, top_p=0.9)
  gpt = bundle.Transformer(config, params, sampling, identity, tuple("abcd"))
  bundle.save_gpt(tmp_path / "gpt", gpt)
  for name in ("vq", "gpt"):
    file = tmp_path / f"{name}{suffix}"
    command = f"export-weights --bundle={tmp_path}/{name} --out={file}"
    assert llamagen(capsys, command)[0] == 0
    command = f"import-weights --file={file} --out={tmp_path}/{name}2"
    code, text = llamagen(capsys, f"{command} --tokenizer={tmp_path}/vq")
    assert code == 0, text
  assert lg.load_tokenizer(tmp_path / "vq2").identity == identity
  again = lg.load_gpt(tmp_path / "gpt2")
  assert dataclasses.replace(again, params=None) == dataclasses.replace(
    gpt, params=None
  )
  jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.extra
def test_files_and_bundles_in_a_bucket(tmp_path, capsys, bucket, tokenizer):
  pytest.importorskip("torch")
  weights = parity.state_dict("gpt_tiny_c2i")
  for suffix in (".pt", ".safetensors"):
    file, out = bucket / f"a{suffix}", bucket / f"gpt{suffix}"
    write_weights(file, weights)
    command = f"import-weights --file={file} --tokenizer={tokenizer} --out={out}"
    code, text = llamagen(capsys, f"{command} {TINY_GPT}")
    assert code == 0, text
    assert str(out) in text
    back = bucket / f"b{suffix}"
    code, text = llamagen(capsys, f"export-weights --bundle={out} --out={back}")
    assert code == 0, text
    assert_same(read_weights(back).tensors, weights)
  code, text = llamagen(
    capsys, f"import-weights --file={bucket}/no.pt --out={bucket}/x"
  )
  assert code == 2 and "no.pt: no such file" in text


def test_home_is_understood(tmp_path, capsys, monkeypatch, tokenizer):
  monkeypatch.setenv("HOME", str(tmp_path))
  write_weights("~/x.safetensors", parity.state_dict("gpt_tiny_c2i"))
  command = f"import-weights --file=~/x.safetensors --tokenizer={tokenizer} --out=~/gpt"
  code, text = llamagen(capsys, f"{command} {TINY_GPT}")
  assert code == 0, text
  assert lg.load_gpt("~/gpt").config.layers == 2
  assert (tmp_path / "gpt" / bundle.CONFIG).exists()


def test_the_platform_is_as_before(tmp_path, capsys):
  """A program that imports weights may use an accelerator afterwards."""
  code = (
    "import jax; from llamagen_jax.commands import cli;"
    f"assert cli.run(['export-weights', '--bundle={tmp_path}', '--out=x.pt']) == 2;"
    "assert jax.config.jax_platforms is None;"
    "from llamagen_jax.parallel import hosts\n"
    "with hosts.cpu_only(): assert jax.devices()[0].platform == 'cpu'\n"
    "assert jax.config.jax_platforms is None; jax.numpy.zeros(2)"
  )
  env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_what_does_not_fit_is_listed_and_nothing_written(tmp_path, capsys, tokenizer):
  weights = parity.state_dict("gpt_tiny_c2i")
  gone = [name for name in weights if name.startswith("layers.1.feed")]
  weights = {name: value for name, value in weights.items() if name not in gone}
  weights["norm.weight"] = np.zeros(63, np.float32)
  weights |= {f"head.{i}": np.zeros(2, np.float32) for i in range(30)}
  file, out = tmp_path / "x.safetensors", tmp_path / "out"
  write_weights(file, weights)
  command = f"import-weights --file={file} --tokenizer={tokenizer} --out={out}"
  code, text = llamagen(capsys, f"{command} {TINY_GPT}")
  assert code == 2
  assert f"{len(gone) + 31} problems" in text
  assert all(f"missing {name}" in text for name in gone)
  assert all(f"unexpected head.{i} (2,)" in text for i in range(30))
  assert "norm.weight is (63,), expected (64,)" in text
  assert not out.exists()


def test_a_bundle_is_not_overwritten(tmp_path, capsys):
  (tmp_path / bundle.CONFIG).write_text(json.dumps({}))
  code, text = llamagen(capsys, f"import-weights --file=x.pt --out={tmp_path}")
  assert code == 2
  assert "is a bundle already" in text


@pytest.mark.extra
def test_the_hub_out_of_reach(tmp_path, capsys, monkeypatch, tokenizer):
  hub = pytest.importorskip("huggingface_hub")

  def offline(repo, file):
    raise hub.errors.LocalEntryNotFoundError("no connection")

  monkeypatch.setattr(hub, "hf_hub_download", offline)
  command = f"import-weights --hub=c2i_B_256 --out={tmp_path}/out"
  code, text = llamagen(capsys, command)
  assert code == 2
  assert "--tokenizer is required" in text  # said before gigabytes are downloaded
  code, text = llamagen(capsys, f"{command} --tokenizer={tokenizer}")
  assert code == 2
  assert "c2i_B_256.pt of FoundationVision/LlamaGen" in text
  assert "--file" in text
  assert len(text.strip().splitlines()) == 1


@pytest.mark.extra
def test_the_hub_within_reach(tmp_path, capsys, monkeypatch, tokenizer):
  hub = pytest.importorskip("huggingface_hub")
  file = tmp_path / "cached.safetensors"
  write_weights(file, parity.state_dict("gpt_tiny_c2i"))
  asked = []

  def download(repo, name):
    asked.append((repo, name))
    return str(file)

  monkeypatch.setattr(hub, "hf_hub_download", download)
  command = f"import-weights --hub=c2i_L_384 --tokenizer={tokenizer} --num-heads=4"
  code, text = llamagen(capsys, f"{command} --out={tmp_path}/out")
  assert code == 2  # a tiny transformer is not what was asked for
  assert "c2i_L_384 is a L" in text
  assert asked == [("FoundationVision/LlamaGen", "c2i_L_384.pt")]


def test_no_accelerator_is_needed(tmp_path, tokenizer):
  """Another process may hold the chips; here there are none of the kind asked for."""
  write_weights(tmp_path / "x.safetensors", parity.state_dict("gpt_tiny_c2i"))
  commands = [
    f"import-weights --file={tmp_path}/x.safetensors --tokenizer={tokenizer} {TINY_GPT}"
    f" --out={tmp_path}/gpt",
    f"export-weights --bundle={tmp_path}/gpt --out={tmp_path}/y.safetensors",
  ]
  for command in commands:
    done = subprocess.run(
      [sys.executable, "-c", "from llamagen_jax.commands import cli; cli.main()",
       *command.split()],
      env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True,
      check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  assert_same(
    read_weights(tmp_path / "y.safetensors").tensors, parity.state_dict("gpt_tiny_c2i")
  )
