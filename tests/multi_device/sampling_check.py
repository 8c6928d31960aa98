"""Eight devices sample the images that one does, bit for bit."""

import dataclasses

import jax
from jax.sharding import AxisType
import numpy as np

from llamagen_jax.parallel.mesh import AXES, make_mesh, replicated
from llamagen_jax.sampling.sample import sample_image_codes
from llamagen_jax.sampling.timings import Timings
from llamagen_jax.weights import bundle
from tests.sampling import fid_batch_test
from tests.sampling.fid_batch_test import JOB, LABELS, load, run

saved = fid_batch_test.saved


def one_device():
  axis_types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh((1, 1, 1), AXES, axis_types, devices=jax.devices()[:1])


def test_one_device_and_eight_write_the_same_file(saved, tmp_path):
  assert jax.device_count() == 8
  found = {}
  for name, mesh in {"one": one_device(), "eight": make_mesh()}.items():
    models = load(saved, mesh)
    found[name] = bundle.fingerprint(models[0].params)
    run(models, tmp_path / f"{name}.npz")
  assert found["one"] == found["eight"]
  one, eight = ((tmp_path / f"{name}.npz").read_bytes() for name in found)
  assert one == eight


def test_random_orders_on_one_device_and_eight(saved):
  """And in batches of another size: an order is of the image's key alone."""
  found = []
  for mesh, batch_size in ((one_device(), 5), (make_mesh(), 2)):
    gpt, tokenizer = load(saved, mesh)
    config = dataclasses.replace(gpt.config, target_embedding=True)
    shape = config.image_tokens, config.dim
    target = jax.random.normal(jax.random.key(3), shape)
    target = jax.device_put(target, replicated(mesh))
    params = gpt.params | {"target_embedding": target}
    gpt = dataclasses.replace(gpt, config=config, params=params)
    sampling = dataclasses.replace(JOB.sampling, order="random")
    job = dataclasses.replace(JOB, sampling=sampling, batch_size=batch_size)
    found.append(sample_image_codes(gpt, tokenizer, job, Timings()))
  np.testing.assert_array_equal(*found)


def test_devices_that_share_a_model(saved, tmp_path):
  one, shared = load(saved, one_device()), load(saved, make_mesh(data=2, tensor=4))
  assert bundle.fingerprint(one[0].params) == bundle.fingerprint(shared[0].params)
  run(one, tmp_path / "one.npz")
  run(shared, tmp_path / "shared.npz")
  files = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "shared")]
  assert len(files[1]) == len(LABELS) == len(JOB.conditions)
  # Sums over parts of a model may round otherwise, and a rare code with them.
  same = (files[0] == files[1]).all(axis=(1, 2, 3))
  assert same.mean() > 0.8
