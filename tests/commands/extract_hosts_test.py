"""extract-codes and extract-text on two hosts, which share a folder or do not."""

import shutil
import signal
import time

import pytest

from llamagen_jax.commands import cli
from tests import tiny
from tests.commands import extract_codes_test
from tests.commands.extract_codes_test import command, files
from tests.processes import finish, start_two_hosts
from tests.training import captions_test

pytestmark = pytest.mark.slow
tokenizer, data = extract_codes_test.tokenizer, captions_test.data  # fixtures


def merged(folders, out):
  for folder in folders:
    shutil.copytree(folder, out, dirs_exist_ok=True)
  return out


def test_codes_of_hosts_without_a_shared_folder(tmp_path, tokenizer):
  source = f"folder:{images(tmp_path, 50)}"
  assert cli.run(command(tokenizer, source, tmp_path / "one")) == 0
  outs = [tmp_path / f"host{host}" for host in range(2)]
  outputs = finish(start_two_hosts([command(tokenizer, source, out) for out in outs]))
  assert "another folder on every host" in outputs[0]
  for output, out in zip(outputs, outs, strict=True):
    assert f"this host's shards are in {out}: copy those of all hosts" in output
    assert not (out / "manifest.json").exists()
  out = merged(outs, tmp_path / "merged")
  assert cli.run(command(tokenizer, source, out)) == 0
  assert files(out) == files(tmp_path / "one")


def test_text_of_hosts_without_a_shared_folder(tmp_path, data):
  def words(out):
    return [
      "extract-text", f"--t5={data}/t5", f"--captions={data}/captions",
      f"--out={out}", "--tokens=20", "--batch-size=4",
    ]  # fmt: skip

  outs = [tmp_path / f"host{host}" for host in range(2)]
  outputs = finish(start_two_hosts([words(out) for out in outs]))
  assert all("copy those of all hosts into one folder" in o for o in outputs)
  assert cli.run(words(merged(outs, tmp_path / "merged"))) == 0
  assert files(tmp_path / "merged") == files(data / "bfloat16")
  finish(start_two_hosts([words(tmp_path / "shared")] * 2))
  assert files(tmp_path / "shared") == files(data / "bfloat16")


@pytest.mark.parametrize("told, number", [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_stops_both_hosts_between_shards(tmp_path, tokenizer, told, number):
  source, out = f"folder:{images(tmp_path, 400)}", tmp_path / "out"
  words = command(tokenizer, source, out, shards=40)
  processes = start_two_hosts([words, words])
  while len(list(out.glob("shard-*.json"))) < 3:
    assert all(process.poll() is None for process in processes), finish(processes)
    time.sleep(0.01)
  processes[told].send_signal(number)
  outputs = finish(processes, code=75)
  for output in outputs:
    assert "resume with the same command" in output and "Traceback" not in output
  done = len(list(out.glob("shard-*.json")))
  assert 3 <= done < 40 and not (out / "manifest.json").exists()
  assert cli.run(words) == 0
  assert not list(out.glob("shard-*.json")) and not list(out.glob(".*"))


def images(folder, count):
  return tiny.write_images(folder / "images", count=count)
