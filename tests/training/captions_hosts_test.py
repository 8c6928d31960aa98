"""A model of captions that draws images while two hosts train it."""

import json

import jax
from PIL import Image
import pytest

from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny
from tests.processes import on_two_hosts
from tests.training import captions_test

data = captions_test.data


@pytest.mark.slow
def test_two_hosts_draw_prompts_at_an_evaluation(data, tmp_path):
  """The text encoder lies over both of them."""
  params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(tmp_path / "vq", tiny.TOKENIZER, params)
  captions_test.write_codes(tmp_path / "codes", range(9))
  path = tmp_path / "codes/manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": identity}))
  config = captions_test.config(data, t5=str(data / "t5"))
  config.data.update(
    codes=str(tmp_path / "codes"), eval_codes=str(tmp_path / "codes"),
    texts=str(data / "captions"), eval_texts=str(data / "captions"),
  )  # fmt: skip
  prompts = ("a blue bird", "two birds")
  config.images = {"tokenizer": str(tmp_path / "vq"), "prompts": prompts}
  tiny.write_config(tmp_path / "config.py", config)
  on_two_hosts([
    "train-gpt", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"
  ])  # fmt: skip
  with Image.open(tmp_path / "run/samples.png") as image:
    assert image.size == (2 * (6 + 2) - 2, 6)
