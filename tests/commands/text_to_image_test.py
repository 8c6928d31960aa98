"""From images with captions to drawn images: the verbs, as a user runs them.

Every verb runs twice, once undisturbed and once killed at a random moment and run
again, over a tar as img2dataset writes it and over a list as the original reads it.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest

from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.features import FeatureSource
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.text.t5 import T5Config, init_t5
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training.gpt_step import GPTRecipe
from llamagen_jax.training.metrics_log import read_rows
from llamagen_jax.training.recipe import build
from llamagen_jax.training.train_gpt import make_task
from llamagen_jax.weights import bundle
from tests import tiny
from tests.processes import ROOT, on_two_hosts

T5 = T5Config(60, 16, layers=2, heads=2, head_dim=8, ffn_dim=24)
TOKENS, STEPS, SIDES = 20, 10, {"stage1": 16, "stage2": 24}
BROKEN, SMALL = tiny.image_bytes(1)[:100], tiny.image_bytes(2, (20, 15))
pytestmark = pytest.mark.slow

PROMPTS = ["a red fox on a green hill", "two blue birds", "ein blauer Vogel"]


@dataclasses.dataclass(frozen=True)
class Sourced:
  """Where the samples come from, and what is expected of them."""

  flags: tuple[str, ...]
  records: int
  second: int  # number of the second one's caption
  empty: int  # captions that cleaning leaves nothing of
  rejected: dict[str, int]
  listed: tuple[str, ...]  # lines of the lists of what was rejected, in order


def write_tars(folder: pathlib.Path) -> Sourced:
  bad = {
    "000000001.jpg": BROKEN,
    "000000002.jpg": SMALL,
    "000000003.txt": b" \n",
    "000000012.txt": b"https://cleaned.away/1.jpg",  # its sample is not valid
  }
  for shard in range(3):
    mine = {name: data for name, data in bad.items() if int(name[:9]) // 8 == shard}
    tiny.write_tar(folder / f"{shard:05d}.tar", 8 * shard, 8, mine)
  return Sourced(
    (f"--source=webdataset:{folder}/*.tar", "--short-key=top_caption"),
    21, 4, 1,
    {"broken images": 1, "empty captions": 1, "small images": 1},
    (
      "000000001\tbroken images\tcannot be decoded (",
      "000000002\tsmall images\t20x15, smaller than min_side=16",
      "000000003\tempty captions\t",
    ),
  )  # fmt: skip


def write_list(folder: pathlib.Path) -> Sourced:
  lines = []
  for i in range(24):
    image = {5: BROKEN, 6: SMALL}.get(i, tiny.image_bytes(i))
    if i != 7:
      (folder / f"{i}.jpg").write_bytes(image)
    caption = tiny.CAPTIONS[i % len(tiny.CAPTIONS)]
    texts = {"alt": caption[:6], "LLaVA": "" if i == 8 else caption}
    lines.append(json.dumps({"image_path": f"{i}.jpg", "text": texts}))
  lines[9] = lines[9][:30]
  (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
  reasons = ("broken", "small", "missing")
  return Sourced(
    (f"--source=jsonl:{folder}/list.jsonl", "--shards=3", "--caption-key=LLaVA",
     "--short-key=alt"),
    19, 1, 0,
    {f"{r} images": 1 for r in reasons} | {"empty captions": 1, "broken lines": 1},
    (
      "list.jsonl:6\tbroken images\tcannot be decoded (",
      "list.jsonl:7\tsmall images\t20x15, smaller than min_side=16",
      "list.jsonl:8\tmissing images\t",
      "list.jsonl:9\tempty captions\t",
      "list.jsonl:10\tbroken lines\t",
    ),
  )  # fmt: skip


def extract_codes(side: int, out: str) -> list[str]:
  return [
    "extract-codes", "--tokenizer=../tokenizer", "--source=captions:captions",
    "--crops=center", "--ranges=1", "--no-mirror", f"--image-size={side}",
    "--shards=3", "--batch-size=4", f"--out={out}",
  ]  # fmt: skip


def train(stage: str, codes: str, out: str, *flags: str) -> list[str]:
  model = {
    "layers": 2, "dim": 32, "vocab_size": tiny.TOKENIZER.codebook_size,
    "caption_tokens": TOKENS, "caption_dim": T5.dim, "grid": SIDES[stage] // 2,
  }  # fmt: skip
  data = {"codes": codes, "eval_codes": codes, "texts": "features",
          "eval_texts": "features"}  # fmt: skip
  run = {"steps": STEPS, "save_every": 2, "eval_every": 5}
  config = {"model": model, "data": data, "run": run, "optimizer": {"lr": 1e-2}}
  return [
    "train-gpt", f"--config={ROOT}/configs/t2i_laion.py:{stage},runlocal",
    *(f"--config.{s}.{n}={v}" for s in config for n, v in config[s].items()),
    f"--workdir={out}", *flags,
  ]  # fmt: skip


def sample(gpt: str, prompts: list[str], out: str) -> list[str]:
  return ["sample", f"--gpt={gpt}/bundle", "--tokenizer=../tokenizer", "--t5=../t5",
          "--count=2", f"--out={out}", "--prompts", *prompts]  # fmt: skip


def verbs(source: Sourced) -> dict[str, list[str]]:
  """The folder that a verb writes -> its words; run in the folder of all of them."""
  prepare = ["prepare-captions", *source.flags, "--min-side=16", "--out=captions"]
  return {
    "captions": [*prepare, "--workers=2"],
    "codes": extract_codes(SIDES["stage1"], "codes"),
    "features": ["extract-text", "--t5=../t5", "--captions=captions",
                 f"--tokens={TOKENS}", "--batch-size=8", "--out=features"],
    "gpt": train("stage1", "codes", "gpt"),
    "drawn": sample("gpt", PROMPTS, "drawn"),
  }  # fmt: skip


def llamagen(cwd, folder: str, words: list[str], after=0, seconds=0.0) -> str:
  """Runs a verb, or kills it between the writes number `after` and `after` + 1."""
  child = [sys.executable, ROOT / "tests" / "killed.py", folder, str(after)]
  done = subprocess.run(
    [*child, str(seconds), *words], cwd=cwd, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    check=False,
  )  # fmt: skip
  expected = -signal.SIGKILL if after else 0
  assert done.returncode == expected, (words[0], after, seconds, done.stdout[-4000:])
  return done.stdout


@pytest.fixture(scope="module", params=[write_tars, write_list])
def whole(tmp_path_factory, request):
  """Every verb, undisturbed: the folder of it all, the source, writes of every verb."""
  folder = tmp_path_factory.mktemp("whole")
  params = jax.device_get(unbox(init_t5(T5, jax.random.key(0))))
  tiny.write_t5(folder / "t5", T5, params)
  tokenizer = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(3)))
  bundle.save_tokenizer(folder / "tokenizer", tiny.TOKENIZER, tokenizer)
  for name in ("source", "whole"):
    (folder / name).mkdir()
  source, writes = request.param(folder / "source"), {}
  for name, words in verbs(source).items():
    printed = llamagen(folder / "whole", name, words)
    writes[name] = int(printed.split()[-1])
    if name == "captions":
      said = "".join(f"; {n} {reason}" for reason, n in source.rejected.items())
      for part in f"{source.records} images with captions{said}".split("; "):
        assert part in printed
  return folder, source, writes


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """File names -> bytes; what a kill left half-written has a hidden name."""
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if not path.name.startswith(".")
  }


def losses(run: pathlib.Path) -> list[float]:
  rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  return [row["loss"] for row in rows]


def state(run: pathlib.Path) -> list:
  place = (run / "checkpoints" / f"step_{STEPS:09d}" / "state").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(place))


def test_kills_change_nothing(whole):
  folder, source, writes = whole
  seed = int.from_bytes(os.urandom(4), "little")
  print(f"seed {seed}")
  moments = random.Random(seed)
  (folder / "killed").mkdir()
  for name, words in verbs(source).items():
    after = moments.randint(1, max(1, int(0.8 * writes[name])))
    llamagen(folder / "killed", name, words, after, moments.uniform(0, 0.5))
    llamagen(folder / "killed", name, words)
  killed, expected = folder / "killed", folder / "whole"
  for name in ("captions", "codes", "features", "drawn"):
    assert contents(killed / name) == contents(expected / name), name
  assert losses(killed / "gpt") == losses(expected / "gpt")
  for a, b in zip(state(killed / "gpt"), state(expected / "gpt"), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_comes_out(whole):
  folder, source, _ = whole
  captions = CaptionSource(folder / "whole" / "captions")
  assert captions.manifest["rejected"] == source.rejected
  lists = sorted((folder / "whole" / "captions").glob("rejected-*.txt"))
  listed = [line for path in lists for line in path.read_text().splitlines()]
  assert len(listed) == len(source.listed)
  for line, start in zip(listed, source.listed, strict=True):
    assert line.startswith(start)
  assert len(captions) == source.records
  assert captions[1].caption == tiny.CAPTIONS[source.second]
  assert captions[1].short == tiny.CAPTIONS[source.second][:6]
  features = FeatureSource(folder / "whole" / "features")
  assert features.manifest["empty"] == source.empty

  first, *_, last = losses(folder / "whole" / "gpt")
  assert abs(first - np.log(16)) < 1e-5 and last < first - 0.1
  gpt = bundle.load_gpt(folder / "whole" / "gpt" / "bundle")
  assert gpt.text_encoder == features.manifest["t5"]
  drawn = folder / "whole" / "drawn"
  lines = (drawn / "captions.txt").read_text().splitlines()
  assert lines == [prompt for prompt in PROMPTS for _ in range(2)]
  images = [np.asarray(Image.open(path)) for path in sorted(drawn.glob("*.png"))]
  assert np.shape(images) == (6, 16, 16, 3)
  assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize("whole", [write_tars], indirect=True)
def test_two_processes_write_and_train_what_one_does(whole):
  folder, source, _ = whole
  two, expected = folder / "two", folder / "whole"
  two.mkdir()
  words = verbs(source)
  for host in (1, 0):
    llamagen(two, "captions", [*words["captions"], "--hosts=2", f"--host={host}"])
  for name in ("codes", "features", "gpt"):
    on_two_hosts(words[name], cwd=two)
  for name in ("captions", "codes", "features"):
    assert contents(two / name) == contents(expected / name), name
  np.testing.assert_allclose(
    losses(two / "gpt"), losses(expected / "gpt"), atol=1e-4, rtol=0
  )
  trained = (bundle.load_gpt(f / "gpt" / "bundle").params for f in (two, expected))
  for a, b in zip(*map(jax.tree.leaves, trained), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("whole", [write_list], indirect=True)
def test_the_second_stage_at_a_larger_size(whole):
  """It starts from the weights of the first, and now and then reads short captions."""
  folder = whole[0] / "whole"
  llamagen(folder, "codes2", extract_codes(SIDES["stage2"], "codes2"))
  llamagen(folder, "gpt2", train("stage2", "codes2", "gpt2", "--init-from=gpt"))
  first = losses(folder / "gpt")
  second = losses(folder / "gpt2")
  assert first[-1] - 0.1 < second[0] < first[0] - 0.1
  llamagen(folder, "drawn2", sample("gpt2", PROMPTS[:1], "drawn2"))
  for path in (folder / "drawn2").glob("*.png"):
    assert np.asarray(Image.open(path)).shape == (24, 24, 3)

  config = json.loads((folder / "gpt2" / "config.json").read_text())
  assert config["data"]["short_share"] == 0.3
  for name in ("codes", "texts", "eval_codes", "eval_texts"):
    config["data"][name] = str(folder / config["data"][name])
  recipe = build(GPTRecipe, ml_collections.ConfigDict(config))
  stream, drawn = make_task(recipe).stream, []
  pairs = [stream.source[i] for i in range(len(stream.source))]
  texts = {record.codes.tobytes(): text for record, text in pairs}
  for batch in itertools.islice(stream.host_batches(0), 100):
    for codes, mask in zip(batch["codes"], batch["mask"], strict=True):
      text = texts[codes.astype(np.uint16).tobytes()]
      if len(text.caption) != len(text.short):
        assert mask.sum() in (len(text.caption), len(text.short))
        drawn.append(mask.sum() == len(text.short))
  assert len(drawn) > 400 and abs(np.mean(drawn) - 0.3) < 0.08
