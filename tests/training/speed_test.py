"""Tokens a second, model FLOP/s utilisation and memory in the log."""

import types

import jax
import pytest

from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.flops import train_flops
from llamagen_jax.training import speed


def test_a_v4_that_takes_a_second_a_step(monkeypatch):
  chip = types.SimpleNamespace(device_kind="TPU v4")
  monkeypatch.setattr(jax, "devices", lambda: [chip] * 4)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  found = speed.speed(speed.Work(8192, 55e12), 0.5)
  assert found["tokens_per_second"] == 16384
  assert found["tokens_per_second_per_chip"] == 4096
  assert found["mfu"] == pytest.approx(55e12 / 0.5 / (4 * 275e12))


def test_a_machine_without_a_known_peak_has_no_utilisation():
  assert "mfu" not in speed.speed(speed.Work(100, 1e9), 2.0)


def test_model_flops_of_gpt_b():
  """Six a weight and token, and attention: 86 M in layers, 12.6 M in the head."""
  config = GPTConfig.preset("B", image_size=256)
  layers = 12 * (4 * 768**2 + 3 * 768 * 2048)
  weights = layers + 768 * 16384
  expected = 6 * weights * 256 + 12 * 12 * 768 * 256**2
  assert train_flops(config, 1) == expected


def test_memory_where_the_device_tells_and_where_not():
  full = {"bytes_in_use": 3 << 30, "peak_bytes_in_use": 5 << 30, "num_allocs": 7}
  device = types.SimpleNamespace(memory_stats=lambda: full)
  assert speed.memory(device) == {"hbm_gib": 3.0, "hbm_peak_gib": 5.0}
  assert speed.memory(types.SimpleNamespace(memory_stats=lambda: None)) == {}
