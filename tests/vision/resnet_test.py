"""ResNet50's logits, of weights by torchvision's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import UserError
from llamagen_jax.vision import resnet
from llamagen_jax.weights.files import write_weights
from llamagen_jax.weights.resnet import load_resnet, resnet_from_torch
from tests import parity

BLOCKS = (3, 4, 6, 3)


def published_shapes():
  """Names and shapes as torchvision's file has them, written out apart from ours."""
  shapes = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}

  def add(conv, norm, out, inputs, size):
    shapes[f"{conv}.weight"] = (out, inputs, size, size)
    for part in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{norm}.{part}"] = (out,)

  add("conv1", "bn1", 64, 3, 7)
  channels = 64
  for i, blocks in enumerate(BLOCKS):
    width = 64 << i
    for j in range(blocks):
      at = f"layer{i + 1}.{j}"
      add(f"{at}.conv1", f"{at}.bn1", width, channels, 1)
      add(f"{at}.conv2", f"{at}.bn2", width, width, 3)
      add(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
      if j == 0:
        add(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1)
      channels = 4 * width
  return shapes


@pytest.fixture(scope="module")
def published():
  tensors = parity.synthesize(published_shapes())
  # Small branches, or the synthesized network multiplies its input by thousands.
  return {n: v / 4 if n.endswith("bn3.weight") else v for n, v in tensors.items()}


def test_the_table_reads_torchvisions_names(published, tmp_path):
  params = resnet_from_torch(published | {"bn1.num_batches_tracked": np.zeros(())})
  found = jax.tree.map(np.shape, params)
  assert found == jax.tree.map(lambda leaf: leaf.shape, resnet.shapes())
  weights = sum(
    np.size(leaf)
    for path, leaf in jax.tree.leaves_with_path(params)
    if path[-1].key not in ("mean", "variance")
  )
  assert weights == 25_557_032  # as published of ResNet50
  missing = {n: v for n, v in published.items() if n != "layer4.2.conv3.weight"}
  with pytest.raises(UserError, match=r"missing layer4\.2\.conv3\.weight"):
    resnet_from_torch(missing)
  with pytest.raises(UserError, match=r"loss\.resnet: no file .*0676ba61"):
    load_resnet(str(tmp_path / "none.pth"))
  with pytest.raises(UserError, match=r"loss\.resnet is empty"):
    load_resnet("")


@pytest.mark.extra
def test_logits_equal_torch(published, tmp_path):
  torch = pytest.importorskip("torch")
  f = torch.nn.functional
  t = {name: torch.from_numpy(value) for name, value in published.items()}

  def convolve(x, conv, norm, stride=1):
    weight = t[f"{conv}.weight"]
    x = f.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    parts = ("running_mean", "running_var", "weight", "bias")
    return f.batch_norm(x, *(t[f"{norm}.{part}"] for part in parts))

  def logits(x):
    x = f.interpolate(
      (x + 1) / 2, size=224, mode="bilinear", align_corners=False, antialias=True
    )
    mean, std = (
      torch.tensor(v)[:, None, None]
      for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = f.relu(convolve((x - mean) / std, "conv1", "bn1", 2))
    x = f.max_pool2d(x, 3, 2, 1)
    for i, blocks in enumerate(BLOCKS, start=1):
      for j in range(blocks):
        at, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
        h = f.relu(convolve(x, f"{at}.conv1", f"{at}.bn1"))
        h = f.relu(convolve(h, f"{at}.conv2", f"{at}.bn2", stride))
        h = convolve(h, f"{at}.conv3", f"{at}.bn3")
        if j == 0:
          x = convolve(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
        x = f.relu(x + h)
    return x.mean(dim=(2, 3)) @ t["fc.weight"].T + t["fc.bias"]

  x, y = (np.tanh(parity.randn(f"resnet/{n}", (1, 3, 256, 256))) for n in "xy")
  with torch.no_grad():
    expected = torch.cat([logits(torch.from_numpy(image)) for image in (x, y)]).numpy()
  path = tmp_path / "resnet50.safetensors"
  write_weights(path, published)
  params = load_resnet(str(path))
  ours = jnp.asarray(np.concatenate([x, y]).transpose(0, 2, 3, 1))
  found = resnet.logits(params, ours, "float32")
  np.testing.assert_allclose(found, expected, atol=2e-4)
  distance = resnet.logits_distance(params, ours[:1], ours[1:], "float32")
  difference = np.mean((expected[0] - expected[1]) ** 2)
  np.testing.assert_allclose(distance, [difference], rtol=1e-3)
