"""`llamagen sample` on two hosts writes the file that one host writes."""

import pytest

from llamagen_jax.commands import cli
from tests.processes import on_two_hosts
from tests.sampling import fid_batch_test

saved = fid_batch_test.saved


@pytest.mark.slow
def test_two_hosts_and_one(saved, tmp_path):
  def command(name):
    return [
      "sample", f"--gpt={saved / 'gpt'}", f"--tokenizer={saved / 'vq'}",
      f"--out={tmp_path / name}.npz", "--fid-batch=11", "--batch-size=3",
      "--guidance-scale=2", "--seed=5",
    ]  # fmt: skip

  on_two_hosts(command("two"))
  assert cli.run(command("one")) == 0
  one, two = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two"))
  assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid.png", "few.npz", "folder"])
def test_two_hosts_gather_their_images_at_the_first(saved, tmp_path, name):
  def command(out):
    return [
      "sample", f"--gpt={saved / 'gpt'}", f"--tokenizer={saved / 'vq'}",
      f"--out={tmp_path / out / name}", "--classes=0-3,1", "--batch-size=2", "--seed=5",
    ]  # fmt: skip

  on_two_hosts(command("two"))
  assert cli.run(command("one")) == 0
  one, two = (
    {
      path.relative_to(tmp_path / out): path.read_bytes()
      for path in sorted((tmp_path / out).rglob("*"))
      if path.suffix in (".png", ".npz")
    }
    for out in ("one", "two")
  )
  assert one and one == two
