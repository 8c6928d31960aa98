"""`llamagen doctor`: a sound machine, and each way in which one is broken."""

import os
import sys

import pytest

from llamagen_jax.commands import cli, doctor

GOOD = [(name.replace("_", "-"), "1.0") for name in doctor.CORE]


def wrong(findings):
  return [finding for finding in findings if finding.wrong]


def test_the_report_of_this_machine(capsys):
  assert cli.run(["doctor"]) in (0, 1)  # a container may have a small /dev/shm
  lines = capsys.readouterr().out.splitlines()
  for label in ("llamagen_jax", "jax ", "devices", "attention", "extra gcs"):
    assert any(line[3:].startswith(label) for line in lines), label
  marked = [line for line in lines if line.startswith("!!")]
  assert [line for line in marked if "/dev/shm" not in line] == []


def test_a_sound_set_of_packages():
  assert not wrong(doctor.versions(GOOD))


@pytest.mark.parametrize(
  "packages, label, words",
  [
    ([*GOOD, ("jax", "0.9.0")], "jax", "several versions: 0.9.0, 1.0"),
    ([p for p in GOOD if p[0] != "grain"], "grain", "not installed"),
    ([*GOOD[2:], ("jax", "1.1"), ("jaxlib", "1.0")], "jax and jaxlib", "1.1 and 1.0"),
    (
      [*GOOD, ("jax-cuda12-plugin", "1.0"), ("jax-cuda13-plugin", "1.0")],
      "CUDA plugins",
      "cuda12 and cuda13 are both installed",
    ),
  ],
)
def test_packages_that_do_not_go_together(packages, label, words):
  (finding,) = wrong(doctor.versions(packages))
  assert finding.label == label and words in finding.value and finding.advice


def test_no_device():
  (finding,) = wrong(doctor.hardware([], "Unable to initialize backend 'tpu'"))
  assert "Unable to initialize backend" in str(finding)


def test_a_device_without_a_data_sheet_is_named():
  devices = [{"platform": "gpu", "kind": "NVIDIA X1", "memory": 2**31}] * 2
  (finding,) = doctor.hardware(devices, "")
  assert finding.value == "2 x NVIDIA X1 (gpu), 2.0 GiB each; no data sheet: no MFU"


@pytest.mark.parametrize(
  "variables, words",
  [
    ({"JAX_PLATFORMS": "tpu"}, "asks for tpu, found cpu"),
    ({"TPU_VISIBLE_CHIPS": "0"}, "TPU_VISIBLE_CHIPS: set, but there is no TPU"),
  ],
)
def test_variables_that_mislead_jax(variables, words):
  (finding,) = wrong(doctor.environment(variables, ["cpu"]))
  assert words in finding.value and finding.advice.startswith("unset ")


def test_little_shared_memory():
  (finding,) = wrong(doctor.machine(64 << 20))
  assert finding.label == "/dev/shm" and "--shm-size=8g" in finding.advice
  assert not wrong(doctor.machine(8 << 30))


def test_a_missing_extra_is_no_error(monkeypatch):
  monkeypatch.setitem(doctor.EXTRAS, "gcs", ("no_such_module", "gs:// paths"))
  finding = next(f for f in doctor.extras() if f.label == "extra gcs")
  assert finding.value == "no gs:// paths" and not finding.wrong
  assert finding.advice == "pip install -e '.[gcs]'"


def test_a_jax_that_fails_or_hangs(monkeypatch):
  monkeypatch.setattr(doctor, "PROBE", "import sys; sys.exit('no such platform')")
  assert doctor.probe() == ([], "no such platform")
  monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(1000)")
  monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
  assert doctor.probe() == ([], "JAX finds no device within 1 s")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's environment")
def test_a_broken_machine_ends_with_code_1(monkeypatch, capsys):
  monkeypatch.setitem(os.environ, "TPU_VISIBLE_CHIPS", "0")
  assert cli.run(["doctor"]) == 1
  assert "need attention" in capsys.readouterr().err
