"""Bundles pushed to a stand-in of the hub, and taken from it elsewhere."""

import json
import os

import jax
import numpy as np
import pytest

constants = pytest.importorskip("huggingface_hub.constants")

from llamagen_jax import UserError  # noqa: E402
from llamagen_jax.commands import cli, import_weights  # noqa: E402
from llamagen_jax.parallel.mesh import make_mesh, unbox  # noqa: E402
from llamagen_jax.training.recipe import build  # noqa: E402
from llamagen_jax.training.tokenizer_state import InitConfig, load_weights  # noqa: E402
from llamagen_jax.training.tokenizer_step import TokenizerRecipe, init_state  # noqa: E402
from llamagen_jax.weights import bundle, hub  # noqa: E402
from tests import tiny  # noqa: E402
from tests.sampling import fid_batch_test  # noqa: E402
from tests.weights import fake_hub  # noqa: E402

saved = fid_batch_test.saved
pytestmark = pytest.mark.extra
GPT, TOKENIZER = "hub:me/gpt", "hub:me/vq"


@pytest.fixture
def server(monkeypatch, tmp_path):
  """The hub, and a client with a token and an empty cache."""
  with fake_hub.serve() as server:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    hub.download.cache_clear()
    yield server
    hub.download.cache_clear()


@pytest.fixture
def pushed(saved, server):
  for name in ("gpt", "vq"):
    assert cli.run(["push", f"--bundle={saved / name}", f"--repo=me/{name}"]) == 0
  return server


def test_sampled_elsewhere_the_codes_are_the_same(saved, pushed, tmp_path):
  flags = ["--classes=0-3", "--count=2", "--seed=3"]
  places = {
    "here": (saved / "gpt", saved / "vq"), "there": (GPT, TOKENIZER),
  }  # fmt: skip
  for name, (gpt, tokenizer) in places.items():
    models = [f"--gpt={gpt}", f"--tokenizer={tokenizer}"]
    assert cli.run(["sample", *models, *flags, f"--out={tmp_path / name}.npz"]) == 0
  here, there = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in places)
  np.testing.assert_array_equal(here, there)


def test_a_tokenizer_starts_from_its_weights(saved, pushed, tmp_path):
  config = tiny.tokenizer_config(tmp_path, 1)
  recipe = build(TokenizerRecipe, config)
  fresh = unbox(init_state(recipe, jax.random.key(5)))
  started = load_weights(InitConfig(TOKENIZER), fresh)
  known = bundle.load_tokenizer(saved / "vq").params
  jax.tree.map(np.testing.assert_array_equal, started.params, known)


def test_onto_a_mesh_and_by_revision(saved, pushed):
  first = pushed.branches["me/vq"]
  pushed.commit("me/vq", {"config.json": b"{}"})
  mesh = make_mesh()
  own = bundle.load_tokenizer(saved / "vq", mesh)
  found = bundle.load_tokenizer(f"{TOKENIZER}@{first}", mesh)
  assert found.identity == own.identity
  jax.tree.map(np.testing.assert_array_equal, found.params, own.params)
  with pytest.raises(UserError, match="holds no bundle that `llamagen push` wrote"):
    bundle.load_tokenizer(TOKENIZER)


def test_large_weights_are_several_files(saved, server, monkeypatch):
  monkeypatch.setattr(hub, "LARGEST", 20_000)
  assert cli.run(["push", f"--bundle={saved / 'vq'}", "--repo=me/vq"]) == 0
  _, files = server.find("me/vq", "main")
  assert sum(name.endswith(".safetensors") for name in files) > 2
  own, found = (bundle.load_tokenizer(p) for p in (saved / "vq", TOKENIZER))
  jax.tree.map(np.testing.assert_array_equal, found.params, own.params)


def test_the_card_says_what_it_is(saved, server, tmp_path):
  scores = tmp_path / "scores.json"
  scores.write_text(json.dumps({"FID": 2.5}))
  flags = [f"--bundle={saved / 'gpt'}", "--repo=me/gpt", "--licence=mit"]
  flags += [f"--tokenizer={TOKENIZER}", f"--scores={scores}"]
  assert cli.run(["push", *flags]) == 0
  card = server.find("me/gpt", "main")[1]["README.md"].decode()
  for words in (
    "license: mit", "library_name: llamagen_jax", "| FID | 2.5 |", "| layers | 2 |",
    f"llamagen sample --gpt={GPT} --tokenizer={TOKENIZER}", "| guidance_scale | 1.0 |",
  ):  # fmt: skip
    assert words in card, words


def test_a_cut_download_goes_on_and_the_cache_is_enough(pushed, monkeypatch):
  pushed.cut = 1
  bundle.load_gpt(GPT)
  assert pushed.cut == 0
  hub.download.cache_clear()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  pushed.asked.clear()
  bundle.load_gpt(GPT)
  assert pushed.asked == []


def test_published_files_go_on_after_a_cut_and_are_whole(server):
  content = bytes(range(256)) * 40
  repo, file = "FoundationVision/LlamaGen", "vq_ds16_c2i.pt"
  server.commit(repo, {file: content})
  server.cut = 1
  path = import_weights.download("vq_ds16_c2i")
  assert path.read_bytes() == content and server.cut == 0
  stored = os.path.realpath(path)
  with open(stored, "r+b") as opened:  # a disk that has lost something
    opened.write(b"x")
  with pytest.raises(UserError, match="sha256 is not the hub's"):
    import_weights.download("vq_ds16_c2i")


def other_byte(content: bytes) -> bytes:
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model.safetensors": other_byte}, "is not the file that was pushed"),
    ({"model.safetensors": lambda c: c[:-9]}, "is not the file that was pushed"),
    ({"config.json": lambda c: b'{"model_type": "bert"}'}, "holds no bundle"),
    ({"config.json": lambda c: b"{"}, "config.json"),
    ({"config.json": lambda c: c.replace(b'"layers": 2', b'"layers": 3')},
     "of another shape than config.json says"),
  ],
)  # fmt: skip
def test_tampered_and_foreign_repositories_are_refused(pushed, change, words):
  _, files = pushed.find("me/gpt", "main")
  pushed.commit("me/gpt", {name: f(files[name]) for name, f in change.items()})
  with pytest.raises(UserError, match=words):
    bundle.load_gpt(GPT)


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--gpt=hub:me/none"], "hub:me/none: "),
    (["--gpt=hub:none"], "hub:none: expected hub:USER/NAME"),
    (["--gpt=hub:me/gpt@v9"], "hub:me/gpt@v9: "),
    (["--gpt=hub:me/vq"], "is a bundle of kind 'tokenizer', expected 'gpt'"),
  ],
)
def test_mistakes_are_one_line(pushed, argv, words, capsys, tmp_path):
  capsys.readouterr()
  out = f"--out={tmp_path / 'x.png'}"
  assert cli.run(["sample", *argv, f"--tokenizer={TOKENIZER}", "--classes=1", out]) == 2
  said = capsys.readouterr().err  # the library's bar, and the line
  assert words in said.splitlines()[-1] and "Traceback" not in said


def test_a_token_that_is_refused_is_not_shown(saved, server, monkeypatch, capsys):
  monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrongwrong")
  assert cli.run(["push", f"--bundle={saved / 'vq'}", "--repo=me/vq"]) == 2
  said = "".join(capsys.readouterr())
  assert "hub:me/vq: " in said and "hf_wrong" not in said
