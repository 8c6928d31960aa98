"""Extraction: bad images, kills, several processes, size."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax.commands import cli
from llamagen_jax.commands.extract_codes import Encoder
from llamagen_jax.data.codes import CodeRecord, CodeSource, CodeWriter
from llamagen_jax.data.images import CropSet, ImageDecoder
from llamagen_jax.data.sources import open_source
from llamagen_jax.images import GAP, LABEL_HEIGHT
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

PROCESS = (
  "import sys, jax; port, host, hosts = sys.argv[1:4]\n"
  "if int(hosts) > 1: jax.distributed.initialize("
  "f'localhost:{port}', int(hosts), int(host))\n"
  "from llamagen_jax.commands import cli; sys.exit(cli.run(sys.argv[4:]))"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "bundle"
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(3)))
  bundle.save_tokenizer(path, tiny.TOKENIZER, params)
  return path


def command(tokenizer, source, out, shards=5, extra=""):
  return (
    f"extract-codes --tokenizer={tokenizer} --source={source} --out={out}"
    f" --image-size=16 --shards={shards} --batch-size=4 {extra}"
  ).split()


def start(arguments, port=0, host=0, hosts=1, devices=1):
  flag = f"--xla_force_host_platform_device_count={devices}"
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [sys.executable, "-c", PROCESS, str(port), str(host), str(hosts), *arguments],
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def files(folder):
  return {
    p.name: p.read_bytes()
    for p in sorted(folder.iterdir())
    if p.suffix in (".array_record", ".json")
  }


def test_bad_images_are_named_and_labels_stay_aligned(tmp_path, tokenizer, capsys):
  images = tiny.write_images(tmp_path / "images", count=400)
  paths = sorted(images.rglob("*.png"))
  bad = [paths[i] for i in (0, 150, 151, 399)]
  for path in bad:
    path.write_bytes(b"broken")
  extra = "--crops=center --ranges=1.0 --no-mirror --check=6"
  arguments = command(tokenizer, f"folder:{images}", tmp_path / "codes", 3, extra)
  assert cli.run(arguments) == 0
  printed = capsys.readouterr().out
  for path in bad:
    assert f"{path.parent.name}/{path.name}: cannot be decoded" in printed
  assert "396 images x 1 crops" in printed
  assert "class0 " in printed
  assert "100.0% of the codes and 6 of 6 labels are confirmed" in printed
  assert (tmp_path / "codes" / "check.png").exists()

  codes, source = CodeSource(tmp_path / "codes"), open_source(f"folder:{images}")
  good = [s for s in source if s.image != b"broken"]
  records = [codes[i] for i in range(len(codes))]
  assert [(r.key, r.label) for r in records] == [(s.key, s.label) for s in good]
  assert codes.manifest["label_counts"] == {"0": 197, "1": 199}
  encoder, crop_set = Encoder(tokenizer), CropSet(16, "center", (1.0,), mirror=False)
  crops = np.stack([crop_set(ImageDecoder(16)(s)) for s in good[148:152]])
  expected = np.asarray(encoder.encode(crops))
  np.testing.assert_array_equal([codes[i].codes for i in range(148, 152)], expected)


def test_a_finished_folder_is_left_as_it_is(tmp_path, tokenizer, capsys):
  images = tiny.write_images(tmp_path / "images")
  arguments = command(tokenizer, f"folder:{images}", tmp_path / "codes", 2)
  assert cli.run(arguments) == 0
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").iterdir()}
  assert cli.run(arguments) == 0
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").iterdir()} == before
  assert "12 images x 20 crops" in capsys.readouterr().out


def test_images_without_labels(tmp_path, tokenizer, capsys):
  images = tiny.write_images(tmp_path / "images") / "class0"
  arguments = command(tokenizer, f"folder:{images}", tmp_path / "codes", 2)
  assert cli.run([*arguments, "--check=2"]) == 0
  printed = capsys.readouterr().out
  assert "no labels" in printed and "2 of 2 labels are confirmed" in printed


def test_images_twice_as_wide_as_high(tmp_path, tokenizer, capsys):
  images, out = tiny.write_images(tmp_path / "images"), tmp_path / "codes"
  extra = "--image-size=16x8 --crops=center --ranges=1 --check=4"
  assert cli.run(command(tokenizer, f"folder:{images}", out, 2, extra)) == 0
  printed = capsys.readouterr().out
  assert "128 bytes of codes an image" in printed
  assert "100.0% of the codes and 4 of 4 labels are confirmed" in printed
  codes = CodeSource(out)
  assert (codes.manifest["image_size"], codes.grid) == ([8, 16], (4, 8))
  assert codes[0].codes.shape == (2, 32)
  width, height = 4 * (16 + GAP) - GAP, 2 * (8 + LABEL_HEIGHT + GAP) - GAP
  assert Image.open(out / "check.png").size == (width, height)
  assert (
    cli.run(command(tokenizer, f"folder:{images}", out, 2, "--image-size=8x16")) == 2
  )
  assert "image_size is [8, 16] there, [16, 8] here" in capsys.readouterr().err
  assert cli.run(command(tokenizer, f"folder:{images}", out, 2, "--image-size=8x")) == 2
  words = "--image-size: '8x': expected SIDE or WIDTHxHEIGHT"
  assert words in capsys.readouterr().err


def test_imagenet_fits_where_it_must(tmp_path):
  """1 281 167 images of 256, ten crops at both ranges: 13.2 GB and 5 % at most."""
  records = 500
  plan = tiny.write_codes(tmp_path / "any") / "plan.json"
  plan = json.loads(plan.read_text())
  from llamagen_jax.data.codes import CodeShardSpec

  crops = CropSet(256, "five", (1.1, 1.05), mirror=True).names
  del plan["format"], plan["kind"]
  plan |= {"crops": crops, "grid": 16, "codebook_size": 16384, "shards": 1}
  plan = CodeShardSpec(**(plan | {"samples": records}))
  writer, rng = CodeWriter(tmp_path / "codes", plan), np.random.default_rng(0)
  key = "n01440764/n01440764_10026.JPEG"
  rows = (CodeRecord(key, 0, rng.integers(0, 16384, (20, 256))) for _ in range(records))
  writer.write_shard(0, rows, {})
  (shard,) = writer.finish()["shards"]
  assert shard["files"]["codes"]["bytes"] / records * 1_281_167 <= 13.2e9 * 1.05


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path, tokenizer):
  images = tiny.write_images(tmp_path / "images", count=400)
  (images / "class0" / "002.png").write_bytes(b"broken")
  source = f"folder:{images}"
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  process = start(command(tokenizer, source, whole, 20))
  assert process.wait(300) == 0, process.stderr.read()
  chance = random.Random(0)
  for kill in range(3):
    process = start(command(tokenizer, source, killed, 20))
    shards = 4 * (kill + 1)
    while process.poll() is None and len(list(killed.glob("codes-*d"))) < shards:
      time.sleep(0.01)
    time.sleep(chance.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (killed / "manifest.json").exists()
  process = start(command(tokenizer, source, killed, 20))
  assert process.wait(300) == 0, process.stderr.read()
  assert files(killed) == files(whole)
  assert not list(killed.glob(".*"))


@pytest.mark.slow
def test_hosts_and_chips_do_not_change_the_shards(tmp_path, tokenizer):
  images = tiny.write_images(tmp_path / "images", count=50)
  source = f"folder:{images}"
  one, two = tmp_path / "one", tmp_path / "two"
  process = start(command(tokenizer, source, one))
  assert process.wait(300) == 0, process.stderr.read()
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  arguments = command(tokenizer, source, two)
  processes = [start(arguments, port, host, 2, devices=2) for host in range(2)]
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  assert files(two) == files(one)
