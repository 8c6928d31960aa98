"""`--fid-batch`: killed and resumed, the npz is the same."""

import dataclasses
import itertools
import json

import jax
import numpy as np
from PIL import Image
import pytest

from llamagen_jax import SamplingConfig, UserError
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.images import resize_bicubic, to_uint8
from llamagen_jax.parallel.mesh import make_mesh, unbox
from llamagen_jax.sampling import fid_batch
from llamagen_jax.sampling.decode import generate
from llamagen_jax.sampling.sample import Labels, SamplingJob, sample_batches
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.weights import bundle
from tests import tiny

SIDE = 6
LABELS = fid_batch.choose_labels("uniform", 22, 4, seed=0)
JOB = SamplingJob(
  Labels(LABELS), SamplingConfig(guidance_scale=2.0, top_k=9), seed=1, batch_size=4,
  image_size=SIDE,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  config = dataclasses.replace(tiny.GPT, vocab_size=16)
  tokenizer_params = unbox(init_tokenizer(tiny.TOKENIZER, jax.random.key(0)))
  identity = bundle.save_tokenizer(folder / "vq", tiny.TOKENIZER, tokenizer_params)
  params = unbox(init_gpt(config, jax.random.key(1)))
  params["head"] = jax.random.normal(jax.random.key(2), params["head"].shape)
  gpt = bundle.Transformer(config, params, SamplingConfig(), identity)
  bundle.save_gpt(folder / "gpt", gpt)
  return folder


def load(saved, mesh):
  return bundle.load_gpt(saved / "gpt", mesh), bundle.load_tokenizer(saved / "vq", mesh)


@pytest.fixture(scope="module")
def models(saved):
  return load(saved, make_mesh())


def run(models, out, job=JOB, settings=(("seed", 1),), folder=None):
  return fid_batch.run(*models, job, out, dict(settings), LABELS, folder=folder)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
  out = tmp_path_factory.mktemp("whole") / "x.npz"
  run(models, out)
  return out


def test_the_npz_of_a_whole_run(whole):
  with np.load(whole) as file:
    images, labels = file["arr_0"], file["arr_1"]
  assert images.shape == (22, SIDE, SIDE, 3)
  assert images.dtype == np.uint8
  assert len(np.unique(images.reshape(22, -1), axis=0)) > 11
  np.testing.assert_array_equal(labels, LABELS)
  assert json.loads(whole.with_suffix(".json").read_text()) == {"seed": 1}
  assert sorted(p.name for p in whole.parent.iterdir()) == ["x.json", "x.npz"]


@pytest.mark.exact
def test_killed_and_resumed(models, whole, tmp_path, monkeypatch):
  out = tmp_path / "x.npz"

  def killed(*args):
    yield from itertools.islice(sample_batches(*args), 3)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(fid_batch, "sample_batches", killed)
    run(models, out)
  assert not out.exists()
  shards = tmp_path / "x.npz.shards"
  assert len(list(shards.glob("batch-*.npy"))) == 3
  (shards / "batch-000001.npy").unlink()
  (shards / ".batch-000004.npy.part").write_bytes(b"half")
  drawn = []

  def watched(gpt, tokenizer, job, batches, seconds):
    drawn.extend(batches)
    return sample_batches(gpt, tokenizer, job, batches, seconds)

  monkeypatch.setattr(fid_batch, "sample_batches", watched)
  with pytest.raises(UserError, match="other settings, seed is 1 there, 2 here"):
    run(models, out, settings={"seed": 2})
  assert run(models, out, folder=tmp_path / "png") is not None
  assert drawn == [0, 1, 2, 3, 4, 5]  # the first ones again, for their PNGs
  assert out.read_bytes() == whole.read_bytes()
  assert not shards.exists()
  images = np.load(out)["arr_0"]
  for row, path in enumerate(sorted((tmp_path / "png").iterdir())):
    assert path.name == f"{row:06d}.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images[row])

  shards.mkdir()  # as a kill would leave it
  assert run(models, out, folder=tmp_path / "later") is None  # finished
  assert not shards.exists()
  later = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "later").iterdir())]
  np.testing.assert_array_equal(later, images)
  with pytest.raises(UserError, match="other settings"):
    run(models, out, settings={"seed": 1, "count": 3})


@pytest.mark.exact
def test_only_missing_batches_are_sampled(models, whole, tmp_path, monkeypatch):
  parts = list(sample_batches(*models, JOB, [0, 2, 5], Timings()))
  assert [batch for batch, _ in parts] == [0, 2, 5]
  images = np.load(whole)["arr_0"]
  for batch, part in parts:
    np.testing.assert_array_equal(part, images[list(JOB.indices(batch))])
  assert len(parts[-1][1]) == 2


def test_time_is_split(models):
  seconds = Timings()
  job = dataclasses.replace(JOB, batch_size=3)  # a shape of its own
  list(sample_batches(*models, job, [0], seconds))
  first = dataclasses.replace(seconds)
  list(sample_batches(*models, job, [1], seconds))
  assert first.compile > 5 * (seconds.compile - first.compile)
  assert seconds.decode > first.decode > 0
  assert seconds.tokenizer > first.tokenizer > 0


def test_images_are_resized_before_they_are_rounded(models):
  """And image i is sampled with the key of (seed, i), whatever is sampled with it."""
  gpt, tokenizer = models
  job = dataclasses.replace(JOB, image_size=SIDE - 2)
  ((_, images),) = sample_batches(gpt, tokenizer, job, [1], Timings())
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), np.arange(4, 8))
  codes = generate(gpt.config, gpt.params, LABELS[4:8], keys, sampling=JOB.sampling)
  floats = tokenizer.decode(codes.reshape(4, 3, 3))
  expected = to_uint8(resize_bicubic(floats, SIDE - 2))
  assert images.shape == (4, SIDE - 2, SIDE - 2, 3)
  assert np.abs(images.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_balanced_labels():
  labels = fid_batch.choose_labels("balanced", 12, 4, seed=0)
  np.testing.assert_array_equal(np.bincount(labels), [3, 3, 3, 3])
  uniform = fid_batch.choose_labels("uniform", 10_000, 4, seed=3)
  assert abs(np.bincount(uniform) - 2500).max() < 150
